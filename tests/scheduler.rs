//! The scheduler, the block pool and the prefix cache under random load, against what each sequence gives alone.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::no_events::NoEvents;
use common::toy_sequences::{VOCAB, alone, open_ended, sequence, short_answers};
use lmserve::engine::{Executor, StepOutput};
use lmserve::error::Kind;
use lmserve::kv::BlockPool;
use lmserve::sched::{FinishReason, NewSequence, Scheduler, SchedulerConfig, Speculation};
use lmserve::sim::ToyModel;
use proptest::prelude::*;

struct Run {
    scheduler: Scheduler,
    model: ToyModel,
    output: StepOutput,
    results: HashMap<u64, (Vec<u32>, FinishReason, usize)>,
}

impl Run {
    fn new(
        num_blocks: usize,
        block_size: usize,
        config: SchedulerConfig,
        prefix_cache: bool,
    ) -> Self {
        let pool = Arc::new(BlockPool::new(num_blocks, block_size, prefix_cache));
        Self {
            scheduler: Scheduler::new(config, pool).unwrap(),
            model: ToyModel::new(num_blocks, block_size, VOCAB),
            output: StepOutput::default(),
            results: HashMap::new(),
        }
    }

    /// One step; what it computed, by sequence.
    fn step(&mut self) -> Vec<(u64, usize)> {
        let step = self.scheduler.plan();
        let computed = step
            .scheduled
            .iter()
            .map(|scheduled| (scheduled.id, scheduled.new_tokens))
            .collect();
        if !step.is_empty() {
            self.model.launch(step).unwrap();
            self.step_planned();
        }
        self.check();
        computed
    }

    /// The outcome of the planned step, which the model has computed.
    fn step_planned(&mut self) {
        let step = self.scheduler.step();
        self.model.collect(step, &mut self.output).unwrap();
        let mut finished = Vec::new();
        self.scheduler
            .commit(&self.output.tokens, &mut NoEvents, &mut finished)
            .unwrap();
        for end in finished {
            let value = (
                end.sequence.tokens().to_vec(),
                end.reason,
                end.sequence.cached_tokens(),
            );
            assert!(
                self.results.insert(end.sequence.id(), value).is_none(),
                "ended twice"
            );
        }
        self.check();
    }

    fn check(&self) {
        let pool = self.scheduler.pool();
        let counts = pool.counts();
        assert_eq!(
            counts.free + counts.owned + counts.cached,
            pool.num_blocks()
        );
        let mut held = vec![0; pool.num_blocks()];
        for sequence in self.scheduler.running().chain(self.scheduler.waiting()) {
            for &block in sequence.table().blocks() {
                held[block as usize] += 1;
            }
        }
        assert_eq!(held, pool.references());
    }

    fn finish(&mut self) {
        for _ in 0..100_000 {
            if self.scheduler.is_idle() {
                return;
            }
            self.step();
        }
        panic!("not idle after 100,000 steps: {:?}", self.scheduler.stats());
    }
}

fn config(max_batch: usize, max_batch_tokens: usize) -> SchedulerConfig {
    SchedulerConfig {
        max_batch,
        max_batch_tokens,
        max_model_len: 4096,
        max_queue: 10_000,
    }
}

#[test]
fn a_short_request_never_waits_behind_a_long_prompt() {
    for longs in [1_u64, 3, 6] {
        let mut run = Run::new(4096, 16, config(16, 128), true);
        for id in 0..longs {
            let prompt = (0..4000_u32).map(|i| (i * 7 + id as u32) % 50).collect();
            run.scheduler.add(sequence(id, prompt, 4)).unwrap();
        }
        run.step();
        let mut waits = Vec::new();
        for id in 100..130 {
            run.scheduler
                .add(sequence(id, vec![id as u32 % 50], 1))
                .unwrap();
            let mut steps = 1;
            while !run.step().iter().any(|&(scheduled, _)| scheduled == id) {
                steps += 1;
            }
            waits.push(steps);
        }
        waits.sort_unstable();
        assert!(
            waits[29] <= 2,
            "{longs} long prompts: waited {waits:?} steps"
        );
        run.finish();
    }
}

#[test]
fn a_newcomer_waits_until_its_first_step_has_window_blocks() {
    // Each of nine that decode holds one of 16 window blocks, or two for a step. The newcomer sees three at once, but its first step
    // takes eight.
    let (window, windows) = (1, 16);
    let pool = BlockPool::new(256, 2, false).with_windows(window, windows);
    let mut run = Run {
        scheduler: Scheduler::new(config(10, 26), Arc::new(pool)).unwrap(),
        model: ToyModel::new(256, 2, VOCAB).with_windows(window, windows),
        output: StepOutput::default(),
        results: HashMap::new(),
    };
    for id in 0..9 {
        let prompt = vec![id as u32; 2 + id as usize % 2];
        run.scheduler.add(sequence(id, prompt, 30)).unwrap();
    }
    run.step();
    run.scheduler.add(sequence(9, vec![9; 17], 2)).unwrap();
    run.finish();
    assert_eq!(run.results[&9].0, alone(&[9; 17], 2));
    assert_eq!(run.scheduler.stats().preemptions, 0);
}

#[test]
fn a_long_prompt_gets_three_quarters_of_every_step() {
    let mut run = Run::new(4096, 16, config(64, 128), true);
    run.scheduler.add(sequence(0, vec![1; 3000], 1)).unwrap();
    run.step();
    for id in 1..200 {
        run.scheduler
            .add(sequence(id, vec![id as u32 % 50; 100], 1))
            .unwrap();
    }
    let mut left = 3000 - 128;
    while left > 0 {
        let computed = run.step();
        let long = computed
            .iter()
            .find(|&&(id, _)| id == 0)
            .map_or(0, |&(_, n)| n);
        assert!(long >= left.min(96), "{left} left: {computed:?}");
        left -= long;
    }
    run.finish();
    assert_eq!(run.results.len(), 200);
}

#[test]
fn a_shared_prefix_is_computed_once() {
    let mut run = Run::new(64, 4, config(4, 64), true);
    let prompt: Vec<u32> = (0..30).collect();
    run.scheduler.add(sequence(1, prompt.clone(), 3)).unwrap();
    run.finish();
    run.scheduler.add(sequence(2, prompt.clone(), 3)).unwrap();
    run.finish();
    assert_eq!(run.results[&1].0, alone(&prompt, 3));
    assert_eq!(run.results[&1].0, run.results[&2].0);
    assert_eq!(run.results[&1].2, 0);
    assert_eq!(run.results[&2].2, 28);
}

/// Prompts of a common prefix of 60 tokens and 4 of their own, added at one moment.
fn add_together(run: &mut Run, ids: std::ops::Range<u64>) -> HashMap<u64, Vec<u32>> {
    let prompt = |id: u64| {
        let prefix = (0..60_u32).map(|i| i * 7 % 50);
        prefix.chain([id as u32; 4]).collect::<Vec<_>>()
    };
    for id in ids.clone() {
        run.scheduler.add(sequence(id, prompt(id), 3)).unwrap();
    }
    ids.map(|id| (id, prompt(id))).collect()
}

#[test]
fn a_prefix_that_arrives_in_many_prompts_at_once_is_computed_once() {
    let mut run = Run::new(256, 4, config(8, 32), true);
    let prompts = add_together(&mut run, 0..6);
    run.finish();
    let outputs = 6 * 2;
    assert_eq!(
        run.scheduler.stats().computed_tokens,
        60 + 6 * 4 + outputs,
        "{:?}",
        run.scheduler.stats()
    );
    assert_eq!(run.scheduler.stats().cached_tokens, 5 * 60);
    for (id, prompt) in prompts {
        let (tokens, _, cached) = &run.results[&id];
        assert_eq!(*tokens, alone(&prompt, 3));
        assert_eq!(*cached, if id == 0 { 0 } else { 60 });
    }
}

#[test]
fn prompts_go_on_by_themselves_when_the_one_they_wait_for_leaves() {
    let mut run = Run::new(256, 4, config(8, 32), true);
    let prompts = add_together(&mut run, 0..3);
    let first = run.step();
    assert_eq!(first, [(0, 32)]);
    drop(run.scheduler.abort(0).unwrap());
    assert_eq!(
        run.step(),
        [(1, 28 + 4)],
        "all but the 32 that were computed"
    );
    run.finish();
    for id in [1, 2] {
        assert_eq!(run.results[&id].0, alone(&prompts[&id], 3));
    }
}

#[test]
fn prompts_alike_wait_for_nobody_where_they_could_share_nothing() {
    let mut run = Run::new(256, 4, config(8, 64), false);
    add_together(&mut run, 0..2);
    assert_eq!(run.step().len(), 2);
    let mut run = Run::new(256, 4, config(8, 64), true);
    for tenant in [1, 2] {
        let new = NewSequence {
            tenant,
            ..sequence(u64::from(tenant), vec![5; 60], 2)
        };
        run.scheduler.add(new).unwrap();
    }
    assert_eq!(run.step().len(), 2);
}

#[test]
fn a_preempted_sequence_resumes_with_the_same_tokens() {
    let mut run = Run::new(10, 4, config(4, 64), true);
    for new in short_answers(100..120) {
        run.scheduler.add(new).unwrap();
    }
    run.finish();
    let prompts: Vec<Vec<u32>> = (0..3).map(|id| vec![id; 8]).collect();
    for (id, prompt) in prompts.iter().enumerate() {
        run.scheduler
            .add(open_ended(id as u64, prompt.clone(), 24))
            .unwrap();
    }
    run.finish();
    assert!(run.scheduler.stats().preemptions > 0);
    for (id, prompt) in prompts.iter().enumerate() {
        assert_eq!(run.results[&(id as u64)].0, alone(prompt, 24));
    }
}

#[test]
fn tenants_share_no_block() {
    let mut run = Run::new(64, 4, config(4, 64), true);
    for tenant in [1, 2] {
        let new = NewSequence {
            tenant,
            ..sequence(u64::from(tenant), vec![5; 20], 2)
        };
        run.scheduler.add(new).unwrap();
        run.finish();
        assert_eq!(run.results[&u64::from(tenant)].2, 0);
    }
}

#[test]
fn priorities_run_first_and_tenants_take_turns() {
    let mut run = Run::new(64, 4, config(1, 64), false);
    let mut add = |id, tenant, priority| {
        let new = NewSequence {
            tenant,
            priority,
            ..sequence(id, vec![id as u32], 2)
        };
        run.scheduler.add(new).unwrap();
    };
    for id in 0..3 {
        add(id, 1, 0);
    }
    add(3, 2, 0);
    add(4, 2, 0);
    add(5, 3, -1);
    let mut order = Vec::new();
    while !run.scheduler.is_idle() {
        for (id, _) in run.step() {
            if order.last() != Some(&id) {
                order.push(id);
            }
        }
    }
    assert_eq!(order, [5, 0, 3, 1, 4, 2]);
}

#[test]
fn what_can_never_fit_and_what_is_too_much_is_refused() {
    let mut run = Run::new(
        4,
        4,
        SchedulerConfig {
            max_queue: 2,
            ..config(1, 64)
        },
        true,
    );
    let error = run.scheduler.add(sequence(1, vec![1; 10], 7)).unwrap_err();
    assert_eq!(
        (error.kind, error.code),
        (Kind::Invalid, "context_length_exceeded")
    );
    run.scheduler.add(sequence(1, vec![1; 10], 6)).unwrap();
    run.scheduler.add(sequence(2, vec![1; 10], 6)).unwrap();
    let error = run.scheduler.add(sequence(3, vec![1], 1)).unwrap_err();
    assert_eq!((error.kind, error.code), (Kind::Busy, "queue_full"));
    run.finish();
    assert_eq!(run.results[&2].0, alone(&[1; 10], 6));
}

#[test]
fn prefill_only_ends_without_a_token() {
    let mut run = Run::new(16, 4, config(2, 18), true);
    run.scheduler.add(sequence(1, vec![3; 40], 0)).unwrap();
    run.finish();
    assert_eq!(run.results[&1], (vec![3; 40], FinishReason::Length, 0));
    assert_eq!(run.scheduler.stats().sampled_tokens, 0);
}

#[test]
fn a_failed_step_frees_its_blocks() {
    let mut run = Run::new(16, 4, config(2, 18), true);
    run.scheduler.add(sequence(1, vec![3; 10], 4)).unwrap();
    run.step();
    run.scheduler.plan();
    let failed = run.scheduler.fail_step().map(|sequence| sequence.id());
    assert_eq!(failed, Some(1));
    assert!(run.scheduler.is_idle());
    assert_eq!(run.scheduler.pool().counts().owned, 0);
}

/// Sixteen sequences that decode, with prompts and outputs of several lengths.
fn sixteen(prefix_cache: bool) -> (Run, HashMap<u64, Vec<u32>>) {
    let mut run = Run::new(512, 4, config(16, 256), prefix_cache);
    let speculation = Speculation {
        max_draft: 3,
        max_rows: 64,
        row_cost: 0.01,
    };
    run.scheduler = run.scheduler.with_speculation(Some(speculation));
    let mut expected = HashMap::new();
    for id in 0..16_u64 {
        let prompt: Vec<u32> = (0..5 + id as u32)
            .map(|i| (i * 3 + id as u32) % 50)
            .collect();
        let max_tokens = 20 + id as usize;
        expected.insert(id, alone(&prompt, max_tokens));
        run.scheduler.add(sequence(id, prompt, max_tokens)).unwrap();
    }
    (run, expected)
}

#[test]
fn a_sequence_that_makes_its_steps_fail_leaves_alone_and_its_neighbours_go_on() {
    for faulty in [vec![0_u64], vec![9], vec![3, 15], (0..16).collect()] {
        let (mut run, mut expected) = sixteen(true);
        for &id in &faulty {
            run.model.failing.insert(id, 20 + id as usize);
            expected.remove(&id);
        }
        let (mut left, mut failures) = (Vec::new(), 0);
        while !run.scheduler.is_idle() {
            let step = run.scheduler.plan();
            if run.model.launch(step).is_ok() {
                run.step_planned();
                continue;
            }
            failures += 1;
            left.extend(run.scheduler.fail_step().map(|sequence| sequence.id()));
            run.check();
        }
        left.sort_unstable();
        assert_eq!(left, faulty);
        // For each of them, at most one failure at each size from 16 down to 1, and that for each length up to which it was drafted.
        assert!(
            failures <= 4 * 5 * faulty.len(),
            "{failures} failures for {faulty:?}"
        );
        for (id, tokens) in expected {
            assert_eq!(run.results[&id].0, tokens);
        }
        assert_eq!(run.scheduler.pool().counts().owned, 0);
    }
}

#[test]
fn a_step_of_many_that_fails_once_costs_nobody_anything_but_time() {
    let (mut run, expected) = sixteen(true);
    for round in 0.. {
        if run.scheduler.is_idle() {
            break;
        }
        run.scheduler.plan();
        if round % 3 == 0 && run.scheduler.step().num_sequences() > 1 {
            assert!(run.scheduler.fail_step().is_none());
            run.check();
        } else {
            let step = run.scheduler.step();
            run.model.launch(step).unwrap();
            run.step_planned();
        }
    }
    for (id, tokens) in expected {
        assert_eq!(run.results[&id].0, tokens);
    }
}

#[test]
fn the_one_that_remains_of_a_step_that_failed_is_not_blamed_for_another_that_left() {
    let mut run = Run::new(64, 4, config(4, 64), true);
    for id in [1, 2] {
        run.scheduler
            .add(sequence(id, vec![id as u32; 8], 3))
            .unwrap();
    }
    run.scheduler.plan();
    drop(run.scheduler.abort(1).unwrap());
    assert!(run.scheduler.fail_step().is_none());
    run.finish();
    assert_eq!(run.results[&2].0, alone(&[2; 8], 3));
}

#[test]
fn logits_that_are_not_finite_end_their_sequence_alone_and_nobody_goes_on_from_its_blocks() {
    let (mut run, mut expected) = sixteen(true);
    let broken = 7;
    let prompt = expected.remove(&broken).unwrap()[..5 + 7].to_vec();
    run.model.not_finite.insert(broken, 25);
    run.finish();
    let (tokens, reason, _) = run.results.remove(&broken).unwrap();
    assert_eq!(reason, FinishReason::Abort);
    assert_eq!(tokens, alone(&prompt, 25 - prompt.len()));
    for (id, tokens) in expected {
        assert_eq!(run.results[&id].0, tokens);
    }
    assert_eq!(run.scheduler.pool().cached_prefix(0, &prompt), 0);
    assert_eq!(run.scheduler.pool().counts().owned, 0);
}

#[derive(Debug, Clone)]
struct Load {
    prompt: Vec<u32>,
    max_tokens: usize,
    arrival: usize,
    abort_after: Option<usize>,
    priority: i32,
}

fn load() -> impl Strategy<Value = Load> {
    // Prompts over three "words" of a few lengths, so that prefixes are often shared.
    let prompt = prop::collection::vec((0_u32..3, 1_usize..12), 1..6).prop_map(|words| {
        words
            .into_iter()
            .flat_map(|(word, n)| (0..n as u32).map(move |i| word * 10 + i))
            .collect()
    });
    (
        prompt,
        0_usize..30,
        0_usize..40,
        prop::option::weighted(0.2, 0_usize..20),
        0..2,
    )
        .prop_map(
            |(prompt, max_tokens, arrival, abort_after, priority)| Load {
                prompt,
                max_tokens,
                arrival,
                abort_after,
                priority,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Small pools force evictions and preemptions; whatever happens, each sequence ends once, with the tokens it gives alone.
    #[test]
    fn outputs_are_those_of_each_sequence_alone(
        loads in prop::collection::vec(load(), 1..40),
        num_blocks in 24_usize..60,
        block_size in 2_usize..6,
        max_batch in 1_usize..8,
        spare in 16_usize..40,
        prefix_cache: bool,
        max_draft in 0_usize..8,
        max_rows in 1_usize..20,
    ) {
        let mut run = Run::new(num_blocks, block_size, config(max_batch, max_batch + spare), prefix_cache);
        let speculation = Speculation { max_draft, max_rows, row_cost: 0.01 };
        run.scheduler = run.scheduler.with_speculation(Some(speculation));
        let limit = run.scheduler.max_tokens();
        let mut expected = HashMap::new();
        let mut aborted = 0;
        for now in 0..80 {
            for (id, load) in loads.iter().enumerate() {
                let id = id as u64;
                if load.arrival == now {
                    let new = NewSequence { priority: load.priority, ..sequence(id, load.prompt.clone(), load.max_tokens) };
                    let fits = load.prompt.len() + load.max_tokens <= limit;
                    prop_assert_eq!(run.scheduler.add(new).is_ok(), fits);
                    if fits {
                        expected.insert(id, alone(&load.prompt, load.max_tokens));
                    }
                }
                if load.abort_after.map(|after| load.arrival + after) == Some(now)
                    && run.scheduler.abort(id).is_some()
                {
                    expected.remove(&id);
                    aborted += 1;
                }
            }
            run.step();
        }
        run.finish();
        prop_assert_eq!(run.results.len(), expected.len());
        for (id, tokens) in expected {
            prop_assert_eq!(&run.results[&id].0, &tokens);
        }
        let stats = run.scheduler.stats();
        prop_assert!(stats.running == 0 && stats.waiting == 0 && aborted <= loads.len());
        prop_assert_eq!(run.scheduler.pool().counts().owned, 0);
    }
}

#[test]
fn sequences_with_different_adapters_share_no_prefix() {
    let mut run = Run::new(64, 8, config(4, 64), true);
    for (id, adapter) in [0, 1, 0, 1, 2].into_iter().enumerate() {
        let new = NewSequence {
            adapter,
            ..sequence(id as u64, (0..24).collect(), 1)
        };
        run.scheduler.add(new).unwrap();
        while run
            .scheduler
            .running()
            .chain(run.scheduler.waiting())
            .count()
            > 0
        {
            run.step();
            let step = &run.scheduler.step().adapters;
            assert!(step.iter().all(|&given| given == adapter as i32));
        }
    }
    let cached: Vec<usize> = (0..5).map(|id| run.results[&id].2).collect();
    // Whole blocks of 8, without the last token, which is computed.
    assert_eq!(cached, [0, 0, 16, 16, 0]);
}
