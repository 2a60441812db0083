//! A token bucket that holds one minute's worth. A pure state machine in whole numbers: no drift, whatever the clock does.

const MINUTE_MS: i64 = 60_000;

/// Is refilled with this many tokens a minute, and holds at most as many. Tokens that are charged afterwards may leave it in debt.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    per_minute: i64,
    /// In tokens / `MINUTE_MS`, so that one millisecond adds exactly `per_minute`.
    level: i64,
    filled_ms: u64,
}

impl TokenBucket {
    /// A full bucket.
    pub const fn new(per_minute: u64, now_ms: u64) -> Self {
        let per_minute = per_minute as i64;
        Self {
            per_minute,
            level: per_minute * MINUTE_MS,
            filled_ms: now_ms,
        }
    }

    const fn capacity(&self) -> i64 {
        self.per_minute * MINUTE_MS
    }

    fn fill(&mut self, now_ms: u64) {
        let elapsed = now_ms.saturating_sub(self.filled_ms);
        let elapsed = i64::try_from(elapsed).unwrap_or(i64::MAX);
        self.filled_ms = self.filled_ms.max(now_ms);
        let added = elapsed.saturating_mul(self.per_minute);
        self.level = self.level.saturating_add(added).min(self.capacity());
    }

    fn wait_for(&self, level: i64) -> u64 {
        let missing = level.saturating_sub(self.level).max(0);
        (missing as u64).div_ceil(self.per_minute as u64)
    }

    fn units(tokens: usize) -> i64 {
        i64::try_from(tokens)
            .unwrap_or(i64::MAX)
            .saturating_mul(MINUTE_MS)
    }

    /// Takes `tokens`, or says after how many milliseconds they would be there; None: never, it holds fewer when full.
    ///
    /// # Errors
    /// The time, where the tokens are not there.
    pub fn take(&mut self, tokens: usize, now_ms: u64) -> Result<(), Option<u64>> {
        self.fill(now_ms);
        let cost = Self::units(tokens);
        if cost > self.capacity() {
            return Err(None);
        }
        if cost > self.level {
            return Err(Some(self.wait_for(cost)));
        }
        self.level -= cost;
        Ok(())
    }

    /// Corrects what was taken: `taken` tokens before, `used` in truth.
    pub fn settle(&mut self, taken: usize, used: usize, now_ms: u64) {
        self.fill(now_ms);
        let level = self.level.saturating_add(Self::units(taken));
        self.level = level.saturating_sub(Self::units(used)).min(self.capacity());
    }

    /// Whole tokens that are there now; none while in debt.
    pub fn remaining(&mut self, now_ms: u64) -> u64 {
        self.fill(now_ms);
        (self.level.max(0) / MINUTE_MS) as u64
    }

    /// Milliseconds until it is full.
    pub fn full_in_ms(&mut self, now_ms: u64) -> u64 {
        self.fill(now_ms);
        self.wait_for(self.capacity())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn it_holds_a_minutes_worth_and_says_when_more_is_there() {
        let mut bucket = TokenBucket::new(600, 1000);
        assert_eq!(bucket.take(601, 1000), Err(None));
        assert_eq!(bucket.take(600, 1000), Ok(()));
        assert_eq!(bucket.remaining(1000), 0);
        assert_eq!(bucket.take(5, 1000), Err(Some(500)));
        assert_eq!(bucket.take(5, 1499), Err(Some(1)));
        assert_eq!(bucket.take(5, 1500), Ok(()));
        assert_eq!(bucket.full_in_ms(1500), 60_000);
        assert_eq!(bucket.remaining(10_000_000), 600);
    }

    #[test]
    fn what_was_reserved_and_not_used_comes_back_and_what_was_not_reserved_is_a_debt() {
        let mut bucket = TokenBucket::new(60, 0);
        bucket.take(40, 0).unwrap();
        bucket.settle(40, 10, 0);
        assert_eq!(bucket.remaining(0), 50);
        bucket.settle(0, 110, 0);
        assert_eq!(bucket.remaining(0), 0);
        // 60 of debt and one token: one a second.
        assert_eq!(bucket.take(1, 0), Err(Some(61_000)));
        assert_eq!(bucket.take(1, 61_000), Ok(()));
    }

    #[test]
    fn a_clock_that_goes_back_adds_nothing() {
        let mut bucket = TokenBucket::new(60, 10_000);
        bucket.take(60, 10_000).unwrap();
        assert_eq!(bucket.remaining(0), 0);
        assert_eq!(bucket.remaining(11_000), 1);
    }

    proptest! {
        /// The wait it gives is the truth: not a millisecond before, and then.
        #[test]
        fn a_wait_is_exact(per_minute in 1_u64..100_000, spent in 0_usize..200_000, cost in 1_usize..100_000, start: u32) {
            let mut bucket = TokenBucket::new(per_minute, u64::from(start));
            bucket.settle(0, spent, u64::from(start));
            match bucket.take(cost, u64::from(start)) {
                Ok(()) => prop_assert!(spent + cost <= per_minute as usize),
                Err(None) => prop_assert!(cost > per_minute as usize),
                Err(Some(wait)) => {
                    let then = u64::from(start) + wait;
                    prop_assert_eq!(bucket.clone().take(cost, then - 1), Err(Some(1)));
                    prop_assert_eq!(bucket.take(cost, then), Ok(()));
                }
            }
        }

        /// Whatever is asked when, no span of time gives more than it adds and what the bucket held.
        #[test]
        fn no_span_gives_more_than_its_share(
            per_minute in 1_u64..5000,
            asks in prop::collection::vec((1_usize..500, 0_u64..5000), 1..60),
        ) {
            let mut bucket = TokenBucket::new(per_minute, 0);
            let (mut now, mut given) = (0, 0);
            for (cost, pause) in asks {
                now += pause;
                if bucket.take(cost, now).is_ok() {
                    given += cost as u64;
                }
                prop_assert!(given * 60_000 <= per_minute * (60_000 + now));
            }
        }
    }
}
