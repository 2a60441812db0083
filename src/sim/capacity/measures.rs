//! What is measured on the virtual clock.

use serde::Serialize;

/// Spans of the timeline. Where they are used up, two become one, so that any length of time fits.
const BINS: usize = 240;
const FIRST_WIDTH: f64 = 0.25;

/// Percentiles of a time in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Spread {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub mean: f64,
    pub worst: f64,
}

impl Spread {
    /// Of times in seconds; sorts them.
    pub(super) fn of(seconds: &mut [f64]) -> Option<Self> {
        let last = seconds.len().checked_sub(1)?;
        seconds.sort_by(f64::total_cmp);
        let percentile = |share: f64| seconds[(share * last as f64).round() as usize] * 1e3;
        Some(Self {
            p50: percentile(0.50),
            p90: percentile(0.90),
            p99: percentile(0.99),
            mean: seconds.iter().sum::<f64>() / seconds.len() as f64 * 1e3,
            worst: seconds[last] * 1e3,
        })
    }
}

/// Any number of times, by size: a bucket is one percent wide.
#[derive(Debug, Default)]
pub(super) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: f64,
    worst: f64,
}

impl Histogram {
    const LEAST: f64 = 1e-6;
    const GROWTH: f64 = 1.01;

    pub(super) fn add(&mut self, seconds: f64) {
        let at = ((seconds / Self::LEAST).max(1.0).ln() / Self::GROWTH.ln()) as usize;
        if at >= self.buckets.len() {
            self.buckets.resize(at + 1, 0);
        }
        self.buckets[at] += 1;
        self.count += 1;
        self.sum += seconds;
        self.worst = self.worst.max(seconds);
    }

    fn percentile(&self, share: f64) -> f64 {
        let wanted = (share * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (at, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Self::LEAST * Self::GROWTH.powf(at as f64 + 0.5);
            }
        }
        self.worst
    }

    pub(super) fn spread(&self) -> Option<Spread> {
        let ms = |share| self.percentile(share).min(self.worst) * 1e3;
        (self.count > 0).then(|| Spread {
            p50: ms(0.50),
            p90: ms(0.90),
            p99: ms(0.99),
            mean: self.sum / self.count as f64 * 1e3,
            worst: self.worst * 1e3,
        })
    }
}

/// What a span of time saw; all but the tokens are sums over time.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Span {
    pub(super) output_tokens: f64,
    pub(super) running: f64,
    pub(super) waiting: f64,
    pub(super) owned_blocks: f64,
}

impl std::ops::AddAssign for Span {
    fn add_assign(&mut self, other: Self) {
        self.output_tokens += other.output_tokens;
        self.running += other.running;
        self.waiting += other.waiting;
        self.owned_blocks += other.owned_blocks;
    }
}

/// Spans of equal length from the start on.
#[derive(Debug)]
pub(super) struct Timeline {
    pub(super) width: f64,
    pub(super) spans: Vec<Span>,
}

impl Timeline {
    pub(super) const fn new() -> Self {
        Self {
            width: FIRST_WIDTH,
            spans: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, time: f64, span: Span) {
        while time >= self.width * BINS as f64 {
            self.width *= 2.0;
            let halved = self.spans.chunks(2).map(|pair| {
                let mut sum = pair[0];
                if let Some(&second) = pair.get(1) {
                    sum += second;
                }
                sum
            });
            self.spans = halved.collect();
        }
        let at = (time / self.width) as usize;
        if at >= self.spans.len() {
            self.spans.resize(at + 1, Span::default());
        }
        self.spans[at] += span;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_right_within_a_percent() {
        let mut histogram = Histogram::default();
        let mut times: Vec<f64> = (1..=1000).map(|at| f64::from(at) * 1e-3).collect();
        for &time in &times {
            histogram.add(time);
        }
        let (near, exact) = (histogram.spread().unwrap(), Spread::of(&mut times).unwrap());
        for (near, exact) in [
            (near.p50, exact.p50),
            (near.p90, exact.p90),
            (near.p99, exact.p99),
            (near.mean, exact.mean),
            (near.worst, exact.worst),
        ] {
            assert!((near / exact - 1.0).abs() < 0.011, "{near} for {exact}");
        }
        assert_eq!(Histogram::default().spread(), None);
    }

    #[test]
    fn a_timeline_of_any_length_keeps_its_sums() {
        let mut timeline = Timeline::new();
        for at in 0..10_000 {
            let span = Span {
                output_tokens: 1.0,
                ..Span::default()
            };
            timeline.add(f64::from(at), span);
        }
        assert!(timeline.spans.len() <= BINS && timeline.spans.len() > BINS / 2);
        let sum: f64 = timeline.spans.iter().map(|span| span.output_tokens).sum();
        assert!((sum - 10_000.0).abs() < 1e-6);
        assert!((timeline.spans[1].output_tokens - timeline.width).abs() < 1.01);
    }
}
