//! Capacity: what a trace of requests comes to on servers of given sizes and speed. The scheduler, the block pool and the
//! sessions are the real ones; the model is a sum that says how long a step takes.

mod measures;
mod replica;
mod setup;

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

pub use measures::Spread;
use measures::{Histogram, Timeline};
use replica::Replica;
pub use setup::{Setup, StepModel, TraceRequest};

use crate::error::Result;

/// What happened on all replicas.
#[derive(Debug)]
struct Tally {
    completed: u64,
    refused: BTreeMap<&'static str, u64>,
    prompt_tokens: u64,
    output_tokens: u64,
    cached_tokens: u64,
    computed_tokens: u64,
    steps: u64,
    preemptions: u64,
    recomputed_tokens: u64,
    evictions: u64,
    /// Seconds until the last replica had nothing left to do.
    elapsed: f64,
    /// Seconds that steps took, on all replicas.
    busy: f64,
    /// When each client began to wait, and for how long.
    first_tokens: Vec<(f64, f64)>,
    gaps: Histogram,
    timeline: Timeline,
}

/// A moment of the timeline, on average over its span and for one replica, but for the rate, which is of all.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Moment {
    pub at_s: f64,
    pub output_tokens_per_s: f64,
    pub running: f64,
    pub waiting: f64,
    pub kv_share: f64,
    /// Of the requests whose clients began to wait in this span.
    pub ttft_ms: Option<Spread>,
}

/// The outcome of a capacity run. Times are in milliseconds of the virtual clock.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Capacity {
    pub completed: u64,
    /// By the error's code.
    pub refused: BTreeMap<&'static str, u64>,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub cached_tokens: u64,
    pub computed_tokens: u64,
    pub steps: u64,
    pub preemptions: u64,
    pub recomputed_tokens: u64,
    pub evictions: u64,
    pub elapsed_s: f64,
    /// Share of the time in which a replica computed.
    pub busy: f64,
    pub output_tokens_per_s: f64,
    pub total_tokens_per_s: f64,
    pub ttft_ms: Option<Spread>,
    pub inter_token_ms: Option<Spread>,
    pub timeline: Vec<Moment>,
}

/// Puts `trace` on the servers of `setup`. Equal arguments give equal outcomes.
///
/// # Errors
/// `invalid_value` for sizes that cannot work.
pub fn capacity(trace: &[TraceRequest], setup: &Setup) -> Result<Capacity> {
    let mut arrivals = vec![VecDeque::new(); setup.replicas];
    let mut turn = 0;
    for request in trace {
        let replica = request.session.map_or_else(
            || {
                turn += 1;
                turn % setup.replicas
            },
            |session| session.rem_euclid(setup.replicas as i64) as usize,
        );
        arrivals[replica].push_back(*request);
    }
    let mut tally = Tally::new();
    for arrivals in arrivals {
        Replica::new(setup, arrivals, &mut tally)?.run()?;
    }
    Ok(tally.report(setup))
}

impl Tally {
    fn new() -> Self {
        Self {
            completed: 0,
            refused: BTreeMap::new(),
            prompt_tokens: 0,
            output_tokens: 0,
            cached_tokens: 0,
            computed_tokens: 0,
            steps: 0,
            preemptions: 0,
            recomputed_tokens: 0,
            evictions: 0,
            elapsed: 0.0,
            busy: 0.0,
            first_tokens: Vec::new(),
            gaps: Histogram::default(),
            timeline: Timeline::new(),
        }
    }

    fn report(self, setup: &Setup) -> Capacity {
        let elapsed = self.elapsed.max(f64::MIN_POSITIVE);
        let replicas = setup.replicas as f64;
        let timeline = self.moments(setup);
        let mut waits: Vec<f64> = self.first_tokens.iter().map(|&(_, wait)| wait).collect();
        Capacity {
            completed: self.completed,
            refused: self.refused,
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.output_tokens,
            cached_tokens: self.cached_tokens,
            computed_tokens: self.computed_tokens,
            steps: self.steps,
            preemptions: self.preemptions,
            recomputed_tokens: self.recomputed_tokens,
            evictions: self.evictions,
            elapsed_s: self.elapsed,
            busy: self.busy / (elapsed * replicas),
            output_tokens_per_s: self.output_tokens as f64 / elapsed,
            total_tokens_per_s: (self.prompt_tokens + self.output_tokens) as f64 / elapsed,
            ttft_ms: Spread::of(&mut waits),
            inter_token_ms: self.gaps.spread(),
            timeline,
        }
    }

    fn moments(&self, setup: &Setup) -> Vec<Moment> {
        let Timeline { width, spans } = &self.timeline;
        let mut waits = vec![Vec::new(); spans.len()];
        for &(started, wait) in &self.first_tokens {
            let at = ((started / width) as usize).min(spans.len() - 1);
            waits[at].push(wait);
        }
        let share = width * setup.replicas as f64;
        let moment = |(at, (span, mut waits)): (usize, (&measures::Span, Vec<f64>))| Moment {
            at_s: (at as f64 + 0.5) * width,
            output_tokens_per_s: span.output_tokens / width,
            running: span.running / share,
            waiting: span.waiting / share,
            kv_share: span.owned_blocks / (share * setup.num_blocks as f64),
            ttft_ms: Spread::of(&mut waits),
        };
        spans.iter().zip(waits).enumerate().map(moment).collect()
    }
}
