//! Drafts by prompt lookup (Saxena 2023, "Prompt Lookup Decoding"): the tokens that followed an earlier occurrence of the sequence's
//! last tokens. The model then checks in one step how many of them are right.

/// Minimum number of tokens that two places must have in common.
const MIN_MATCH: usize = 2;
/// Longer matches are not distinguished.
const MAX_MATCH: usize = 8;
/// Number of earlier places that are compared, the latest first.
const MAX_PLACES: usize = 8;
/// How often the token after a match of this many tokens was right: the mean over summaries, corrections, edits of code and chat.
/// A sequence begins with these shares and continues with its own.
const SHARES: [f32; MAX_MATCH + 1] = [0.0, 0.0, 0.5, 0.65, 0.72, 0.78, 0.84, 0.9, 0.95];
/// Weight of the latest outcome in a sequence's own shares.
pub(super) const RATE: f32 = 0.1;
const NONE: u32 = u32::MAX;

/// Follows one sequence and drafts what may come next. The time per token does not depend on the sequence's length. A token takes 8 to
/// 12 bytes.
#[derive(Debug)]
pub(super) struct Drafter {
    /// By the hash of [`MIN_MATCH`] tokens: the latest place of the last one. Its length is a power of two, at least one entry per token.
    heads: Vec<u32>,
    /// For each token: the previous place with the same hash.
    earlier: Vec<u32>,
    /// Place of the token that should come next.
    source: usize,
    /// Number of tokens that the end of the sequence and the tokens before `source` have in common, up to [`MAX_MATCH`]. 0: there is no
    /// match.
    matched: usize,
    shares: [f32; MAX_MATCH + 1],
}

fn hash(tokens: &[u32]) -> usize {
    let hash = tokens
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &token| {
            (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
    (hash >> 32) as usize
}

impl Drafter {
    /// A draft state for `tokens`.
    pub(super) fn new(tokens: &[u32]) -> Self {
        let mut drafter = Self {
            heads: Vec::new(),
            earlier: Vec::with_capacity(tokens.len()),
            source: 0,
            matched: 0,
            shares: SHARES,
        };
        drafter.index(tokens);
        drafter.find(tokens);
        drafter
    }

    /// Adds the last one of `tokens`, which the sequence has just gained.
    pub(super) fn push(&mut self, tokens: &[u32]) {
        let Some(&token) = tokens.last() else { return };
        self.index(tokens);
        if self.matched == 0 {
            return self.find(tokens);
        }
        let came = tokens[self.source] == token;
        // This is done whether or not it was drafted, so that learning costs no step.
        let share = &mut self.shares[self.matched];
        *share += RATE * (f32::from(u8::from(came)) - *share);
        if came {
            self.source += 1;
            self.matched = (self.matched + 1).min(MAX_MATCH);
        } else {
            self.find(tokens);
        }
    }

    /// How likely the first token that it would draft is right; 0: it would draft none.
    pub(super) fn share(&self) -> f32 {
        self.shares[self.matched]
    }

    /// Appends up to `most` tokens that may follow `tokens` to `draft`, as long as `pays` accepts the probability that all tokens up to
    /// this one are right.
    pub(super) fn draft(
        &self,
        tokens: &[u32],
        most: usize,
        mut pays: impl FnMut(f32) -> bool,
        draft: &mut Vec<u32>,
    ) {
        if self.matched == 0 {
            return;
        }
        let mut probability = 1.0;
        for at in 0..most {
            probability *= self.shares[(self.matched + at).min(MAX_MATCH)];
            if !pays(probability) {
                return;
            }
            // A draft that reaches the end of the sequence repeats itself.
            let place = self.source + at;
            let known = tokens.get(place).copied();
            draft.push(known.unwrap_or_else(|| draft[place - tokens.len()]));
        }
    }

    /// Adds the new tokens to the tables.
    fn index(&mut self, tokens: &[u32]) {
        if tokens.len() > self.heads.len() {
            self.heads = vec![NONE; (2 * tokens.len()).next_power_of_two()];
            self.earlier.clear();
        }
        for at in self.earlier.len()..tokens.len() {
            let mut before = NONE;
            if at + 1 >= MIN_MATCH {
                let slot = hash(&tokens[at + 1 - MIN_MATCH..=at]) & (self.heads.len() - 1);
                before = std::mem::replace(&mut self.heads[slot], at as u32);
            }
            self.earlier.push(before);
        }
    }

    /// Looks for the longest match of the end of `tokens`, the latest among equals.
    fn find(&mut self, tokens: &[u32]) {
        self.matched = 0;
        let Some(&(mut place)) = self.earlier.last() else {
            return;
        };
        for _ in 0..MAX_PLACES {
            if place == NONE {
                return;
            }
            let at = place as usize;
            let pairs = tokens[..=at].iter().rev().zip(tokens.iter().rev());
            let common = pairs.take(MAX_MATCH).take_while(|(a, b)| a == b).count();
            if common >= MIN_MATCH && common > self.matched {
                (self.source, self.matched) = (at + 1, common);
            }
            place = self.earlier[at];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(drafter: &Drafter, tokens: &[u32], most: usize) -> Vec<u32> {
        let mut draft = Vec::new();
        drafter.draft(tokens, most, |_| true, &mut draft);
        draft
    }

    #[test]
    fn what_followed_the_longest_match_is_drafted() {
        let tokens = [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3];
        let drafter = Drafter::new(&tokens);
        assert_eq!(drafter.matched, 3);
        assert_eq!(draft(&drafter, &tokens, 4), [4, 9, 2, 3]);
    }

    #[test]
    fn the_latest_of_equal_matches_is_drafted() {
        let tokens = [2, 3, 4, 7, 2, 3, 5, 8, 2, 3];
        assert_eq!(draft(&Drafter::new(&tokens), &tokens, 2), [5, 8]);
    }

    #[test]
    fn a_draft_that_reaches_the_end_repeats_itself() {
        let tokens = [5, 6, 7, 5, 6, 7];
        let drafter = Drafter::new(&tokens);
        assert_eq!(draft(&drafter, &tokens, 7), [5, 6, 7, 5, 6, 7, 5]);
    }

    #[test]
    fn one_token_is_no_match() {
        let tokens = [1, 2, 3, 1, 4, 3];
        assert_eq!(draft(&Drafter::new(&tokens), &tokens, 4), [0_u32; 0]);
        for tokens in [&[][..], &[1], &[1, 1]] {
            assert_eq!(draft(&Drafter::new(tokens), tokens, 4), [0_u32; 0]);
        }
    }

    #[test]
    fn a_sequence_that_grows_is_followed_as_if_it_had_been_given_whole() {
        let tokens: Vec<u32> = (0..3000_u32)
            .map(|i| i.wrapping_mul(2_654_435_761) >> 29)
            .collect();
        let mut drafter = Drafter::new(&tokens[..1]);
        for end in 2..=tokens.len() {
            drafter.push(&tokens[..end]);
        }
        let whole = Drafter::new(&tokens);
        for place in 1..tokens.len() {
            assert!(drafter.earlier[place] == NONE || drafter.earlier[place] < place as u32);
        }
        assert!(drafter.heads.len() <= 4 * tokens.len());
        assert_eq!(drafter.earlier.len(), whole.earlier.len());
        assert!(drafter.matched >= MIN_MATCH && whole.matched >= MIN_MATCH);
    }

    #[test]
    fn what_comes_again_and_again_is_trusted_more_and_what_does_not_less() {
        let mut tokens: Vec<u32> = (0..10).collect();
        let mut drafter = Drafter::new(&tokens);
        for token in 0..400 {
            tokens.push(token % 10);
            drafter.push(&tokens);
        }
        assert!(drafter.shares[MAX_MATCH] > 0.99, "{:?}", drafter.shares);
        // Pairs come again, and something else follows each time.
        for token in 100..300 {
            tokens.extend([7, 8, token]);
            for end in tokens.len() - 2..=tokens.len() {
                drafter.push(&tokens[..end]);
            }
        }
        assert!(drafter.shares[MIN_MATCH] < 0.01, "{:?}", drafter.shares);
    }

    #[test]
    fn a_draft_ends_where_it_does_not_pay() {
        let tokens = [1, 2, 3, 4, 5, 6, 1, 2];
        let drafter = Drafter::new(&tokens);
        let mut probabilities = Vec::new();
        let mut draft = Vec::new();
        let pays = |p| {
            probabilities.push(p);
            p > 0.3
        };
        drafter.draft(&tokens, 8, pays, &mut draft);
        assert_eq!(draft, [3, 4]);
        let expected = [0.5, 0.5 * 0.65, 0.5 * 0.65 * 0.72];
        assert_eq!(probabilities, expected);
    }
}
