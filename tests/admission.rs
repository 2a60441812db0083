//! Who may join the batch: what the running sequences will still take is left to them.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use common::toy_sequences::sequence;
use lmserve::kv::BlockPool;
use lmserve::sched::{FinishReason, NewSequence, Scheduler, SchedulerConfig, StepTokens};

/// Ends each answer where it would end by itself.
#[derive(Debug, Default)]
struct Ends {
    lengths: BTreeMap<u64, usize>,
    given: BTreeMap<u64, usize>,
}

impl StepTokens for Ends {
    fn on_token(
        &mut self,
        id: u64,
        _: usize,
        _: u32,
        _: Option<FinishReason>,
    ) -> Option<FinishReason> {
        let given = self.given.entry(id).or_default();
        *given += 1;
        (self.lengths.get(&id) == Some(given)).then_some(FinishReason::Stop)
    }

    fn on_prompt_token(&mut self, _: u64, _: usize, _: u32) {}
}

/// A scheduler without a model: every token is the same.
struct Run {
    scheduler: Scheduler,
    ends: Ends,
    finished: BTreeSet<u64>,
    /// Most sequences that ran in one step.
    most_running: usize,
    /// Tokens that nobody can do without: those of each prompt, and each generated one but the last.
    least_computed: u64,
    next: u64,
}

impl Run {
    fn new(kv_tokens: usize) -> Self {
        let pool = Arc::new(BlockPool::new(kv_tokens / 16, 16, true));
        let config = SchedulerConfig {
            max_batch: 64,
            max_batch_tokens: 256,
            max_model_len: kv_tokens,
            max_queue: 10_000,
        };
        Self {
            scheduler: Scheduler::new(config, pool).unwrap(),
            ends: Ends::default(),
            finished: BTreeSet::new(),
            most_running: 0,
            least_computed: 0,
            next: 0,
        }
    }

    fn submit(&mut self, new: NewSequence, length: Option<usize>) -> u64 {
        let (id, count) = (self.next, length.unwrap_or(new.max_tokens));
        self.next += 1;
        self.least_computed += (new.prompt.len() + count - 1) as u64;
        self.ends.lengths.extend(length.map(|length| (id, length)));
        // A token that is never sampled.
        let stop_tokens = length.iter().map(|_| 2).collect();
        self.scheduler
            .add(NewSequence {
                id,
                stop_tokens,
                ..new
            })
            .unwrap();
        id
    }

    /// A request whose prompt nobody else has. With a `length`, its answer ends there by itself.
    fn add(&mut self, prompt: usize, max_tokens: usize, length: Option<usize>) -> u64 {
        let prompt = vec![3 + self.next as u32; prompt];
        self.submit(sequence(0, prompt, max_tokens), length)
    }

    fn step(&mut self) {
        let rows = self.scheduler.plan().num_rows();
        self.most_running = self.most_running.max(self.scheduler.stats().running);
        let mut finished = Vec::new();
        self.scheduler
            .commit(&vec![1; rows], &mut self.ends, &mut finished)
            .unwrap();
        self.finished
            .extend(finished.iter().map(|end| end.sequence.id()));
    }

    fn finish(&mut self) {
        while !self.scheduler.is_idle() {
            self.step();
        }
        let stats = self.scheduler.stats();
        assert_eq!(self.finished.len() as u64, self.next);
        assert_eq!(
            stats.computed_tokens - stats.recomputed_tokens + stats.cached_tokens,
            self.least_computed
        );
    }

    fn is_running(&self, id: u64) -> bool {
        self.scheduler.running().any(|running| running.id() == id)
    }
}

/// Lengths that most often are near 100 and sometimes far above.
fn lengths(count: usize) -> impl Iterator<Item = usize> {
    let mut state = 7_u64;
    (0..count).map(move |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let uniform = (state >> 11) as f64 / (1_u64 << 53) as f64;
        1 + (-100.0 * (1.0 - uniform).ln()) as usize
    })
}

/// 64 requests of 1,000 + 200 tokens on 16k tokens of KV. Where each took what was free at the moment, 119 were preempted, a tenth
/// of the tokens was computed twice, and it took 1,073 steps.
#[test]
fn a_burst_that_does_not_fit_is_computed_once_in_no_more_steps() {
    for may_end_before in [false, true] {
        let mut run = Run::new(16 << 10);
        for _ in 0..64 {
            run.add(1000, 200, may_end_before.then_some(200));
        }
        run.finish();
        let stats = run.scheduler.stats();
        assert!(
            stats.recomputed_tokens * 100 < stats.computed_tokens && stats.steps <= 1073,
            "{stats:?}"
        );
        // 13 would fit with all their tokens at once.
        assert!(run.most_running >= 14, "{}", run.most_running);
    }
}

#[test]
fn lengths_far_below_the_limit_are_learned() {
    let (mut told, mut learned) = (Run::new(16 << 10), Run::new(16 << 10));
    for length in lengths(600) {
        told.add(200, length, None);
        learned.add(200, 4000, Some(length));
    }
    // As long as nothing is known, each may take the limit.
    learned.step();
    assert!(learned.scheduler.stats().running <= 4);
    told.finish();
    learned.finish();
    let (told, stats) = (told.scheduler.stats(), learned.scheduler.stats());
    assert!(
        stats.steps * 100 < told.steps * 115,
        "{} steps, {} where the lengths are told",
        stats.steps,
        told.steps
    );
    assert!(
        stats.recomputed_tokens * 100 < stats.computed_tokens,
        "{stats:?}"
    );
}

#[test]
fn answers_that_get_longer_than_those_before_are_preempted_and_end_with_all_their_tokens() {
    let mut run = Run::new(4 << 10);
    for _ in 0..100 {
        run.add(50, 1000, Some(5));
    }
    run.finish();
    assert_eq!(run.scheduler.stats().preemptions, 0);
    for _ in 0..600 {
        run.add(50, 1000, Some(500));
    }
    run.finish();
    let before = run.scheduler.stats();
    assert!(before.recomputed_tokens > 0);
    // By now nobody remembers the short ones.
    for _ in 0..100 {
        run.add(50, 1000, Some(500));
    }
    run.finish();
    let stats = run.scheduler.stats();
    let again = stats.recomputed_tokens - before.recomputed_tokens;
    let computed = stats.computed_tokens - before.computed_tokens;
    assert!(again * 100 < computed, "{again} of {computed}");
}

#[test]
fn a_large_request_gets_in_among_a_stream_of_small_ones() {
    for length in [None, Some(60)] {
        let mut run = Run::new(4 << 10);
        let small = |run: &mut Run| run.add(100, 60, length);
        for _ in 0..300 {
            small(&mut run);
            run.step();
        }
        assert!(run.scheduler.stats().waiting > 0);
        let ahead = run.scheduler.stats().waiting;
        let large = run.add(3000, 1000, None);
        let mut steps = 0;
        while !run.is_running(large) {
            small(&mut run);
            run.step();
            steps += 1;
            assert!(steps < 60 * (2 + ahead / 10), "{ahead} were ahead");
        }
        run.finish();
    }
}

#[test]
fn a_request_that_takes_everything_runs_alone() {
    let mut run = Run::new(4 << 10);
    let first = run.add(4000, 96, None);
    let rest: Vec<u64> = (0..10).map(|_| run.add(10, 5, None)).collect();
    run.step();
    assert!(run.is_running(first));
    run.finish();
    assert!(rest.iter().all(|id| run.finished.contains(id)));
    assert_eq!(run.scheduler.stats().recomputed_tokens, 0);
    // Whatever runs when it comes.
    for _ in 0..10 {
        run.add(10, 50, None);
    }
    run.step();
    run.add(4095, 1, None);
    run.finish();
    assert_eq!(run.scheduler.stats().recomputed_tokens, 0);
}

#[test]
fn an_urgent_request_does_not_wait_for_what_others_will_take() {
    let mut run = Run::new(4 << 10);
    let patient = run.add(2000, 2000, None);
    run.step();
    let other = run.add(1000, 1000, None);
    let urgent = NewSequence {
        priority: -1,
        ..sequence(0, vec![1; 1000], 1000)
    };
    let urgent = run.submit(urgent, None);
    run.step();
    assert!(run.is_running(patient) && run.is_running(urgent));
    assert!(!run.is_running(other));
    run.finish();
    // Those that were there gave way once, and not time and again.
    assert_eq!(run.scheduler.stats().preemptions, 1);
}

#[test]
fn what_requests_share_counts_once() {
    let mut run = Run::new(16 << 10);
    let prompt: Vec<u32> = vec![1; 8000];
    for _ in 0..20 {
        run.submit(sequence(0, prompt.clone(), 200), None);
    }
    run.finish();
    assert_eq!(run.most_running, 20);
    assert_eq!(run.scheduler.stats().preemptions, 0);
}
