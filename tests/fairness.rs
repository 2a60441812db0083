//! What the scheduler promises to each of many: shares by weight, places kept, urgent ones first.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::toy_sequences::{VOCAB, open_ended, sequence, short_answers};
use lmserve::engine::{Executor, StepOutput};
use lmserve::kv::BlockPool;
use lmserve::sched::{FinishReason, NewSequence, Scheduler, SchedulerConfig, StepTokens};
use lmserve::sim::{ToyModel, next_token};

/// Notes who got a token, in order.
#[derive(Default)]
struct Order(Vec<u64>);

impl StepTokens for Order {
    fn on_prompt_token(&mut self, _: u64, _: usize, _: u32) {}

    fn on_token(
        &mut self,
        id: u64,
        _: usize,
        _: u32,
        _: Option<FinishReason>,
    ) -> Option<FinishReason> {
        self.0.push(id);
        None
    }
}

struct Run {
    scheduler: Scheduler,
    model: ToyModel,
    output: StepOutput,
    order: Order,
    outputs: BTreeMap<u64, Vec<u32>>,
}

impl Run {
    fn new(num_blocks: usize, max_batch: usize, max_batch_tokens: usize) -> Self {
        let config = SchedulerConfig {
            max_batch,
            max_batch_tokens,
            max_model_len: 1024,
            max_queue: 1000,
        };
        let pool = Arc::new(BlockPool::new(num_blocks, 4, false));
        Self {
            scheduler: Scheduler::new(config, pool).unwrap(),
            model: ToyModel::new(num_blocks, 4, VOCAB),
            output: StepOutput::default(),
            order: Order::default(),
            outputs: BTreeMap::new(),
        }
    }

    fn add(&mut self, id: u64, tenant: u32, priority: i32, prompt: Vec<u32>, max_tokens: usize) {
        let new = NewSequence {
            tenant,
            priority,
            ..sequence(id, prompt, max_tokens)
        };
        self.scheduler.add(new).unwrap();
    }

    /// One step; the ids of the sequences in it.
    fn step(&mut self) -> Vec<u64> {
        let step = self.scheduler.plan();
        let ids = step
            .scheduled
            .iter()
            .map(|scheduled| scheduled.id)
            .collect();
        if !step.is_empty() {
            self.model.launch(step).unwrap();
            self.model.collect(step, &mut self.output).unwrap();
            let mut finished = Vec::new();
            self.scheduler
                .commit(&self.output.tokens, &mut self.order, &mut finished)
                .unwrap();
            for end in finished {
                let sequence = end.sequence;
                self.outputs
                    .insert(sequence.id(), sequence.output().to_vec());
            }
        }
        ids
    }

    fn finish(&mut self) {
        for _ in 0..10_000 {
            if self.scheduler.is_idle() {
                return;
            }
            self.step();
        }
        panic!("not idle: {:?}", self.scheduler.stats());
    }
}

/// A sequence of numbers that has no pattern to fall in step with.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        ((self.0 >> 33) % limit) as usize
    }
}

#[test]
fn busy_tenants_get_tokens_in_proportion_to_their_weights() {
    let weights = [1_u32, 2, 5];
    let mut run = Run::new(1024, 8, 64);
    for (tenant, &weight) in weights.iter().enumerate() {
        run.scheduler.set_weight(tenant as u32, weight).unwrap();
    }
    let mut numbers = Numbers(1);
    let mut open: BTreeMap<u64, (usize, usize)> = BTreeMap::new();
    let mut served = [0; 3];
    let mut next = 0;
    for _ in 0..20_000 {
        for tenant in 0..weights.len() {
            let mut waiting = open.values().filter(|&&(of, _)| of == tenant).count();
            while waiting < 12 {
                // Requests differ in size from tenant to tenant: what is shared is tokens.
                let prompt = vec![tenant as u32 + 1; 1 + numbers.below(20 << tenant)];
                let output = 1 + numbers.below(40 >> tenant);
                open.insert(next, (tenant, prompt.len() + 2 * output));
                run.add(next, tenant as u32, 0, prompt, output);
                next += 1;
                waiting += 1;
            }
        }
        run.step();
        for (id, _) in std::mem::take(&mut run.outputs) {
            let (tenant, tokens) = open.remove(&id).unwrap();
            served[tenant] += tokens;
        }
    }
    let all: usize = served.iter().sum();
    assert!(all > 500_000, "{served:?}");
    for (tenant, &weight) in weights.iter().enumerate() {
        let share = served[tenant] as f64 / all as f64;
        let due = f64::from(weight) / f64::from(weights.iter().sum::<u32>());
        assert!(
            (share / due - 1.0).abs() < 0.03,
            "{served:?}: {share}, not {due}"
        );
    }
}

#[test]
fn a_tenant_that_was_idle_has_saved_nothing_up() {
    let mut run = Run::new(256, 1, 64);
    for id in 0..50 {
        run.add(id, 1, 0, vec![1; 8], 4);
    }
    for _ in 0..60 {
        run.step();
    }
    let before = run.outputs.len();
    assert!(before > 5);
    for id in 100..150 {
        run.add(id, 2, 0, vec![2; 8], 4);
    }
    for _ in 0..80 {
        run.step();
    }
    let newcomers = run.outputs.keys().filter(|&&id| id >= 100).count();
    let others = run.outputs.len() - before - newcomers;
    assert!(newcomers.abs_diff(others) <= 1, "{newcomers} and {others}");
}

#[test]
fn a_victim_keeps_its_place_and_its_output() {
    // Blocks for two of the four that join, as they get longer than all before; whoever came last is preempted, and still comes
    // before those that came after it.
    let mut run = Run::new(17, 4, 64);
    for new in short_answers(100..120) {
        run.scheduler.add(new).unwrap();
    }
    run.finish();
    run.outputs.clear();
    run.order.0.clear();
    for id in 0..5 {
        let new = open_ended(id, vec![id as u32 + 1; 8], 24);
        run.scheduler.add(new).unwrap();
    }
    let mut first_steps = Vec::new();
    for _ in 0..1000 {
        for id in run.step() {
            if !first_steps.contains(&id) {
                first_steps.push(id);
            }
        }
    }
    assert!(run.scheduler.stats().preemptions > 0);
    assert_eq!(first_steps, [0, 1, 2, 3, 4]);
    let ends: Vec<u64> = {
        let mut left: BTreeMap<u64, usize> = (0..5).map(|id| (id, 24)).collect();
        let tokens = run.order.0.iter();
        tokens
            .filter(|&id| {
                let count = left.get_mut(id).unwrap();
                *count -= 1;
                *count == 0
            })
            .copied()
            .collect()
    };
    assert_eq!(ends, [0, 1, 2, 3, 4]);
    for (id, output) in &run.outputs {
        let mut tokens = vec![*id as u32 + 1; 8];
        for _ in 0..24 {
            tokens.push(next_token(&tokens, VOCAB));
        }
        assert_eq!(*output, tokens[8..]);
    }
    assert_eq!(run.outputs.len(), 5);
}

#[test]
fn an_urgent_request_is_in_the_next_step_that_has_a_place() {
    let mut run = Run::new(256, 2, 64);
    for id in 0..20 {
        run.add(id, 0, 0, vec![1; 4], 3);
    }
    run.step();
    run.add(100, 0, -1, vec![2; 4], 3);
    let mut others = 0;
    while !run.step().contains(&100) {
        others += 1;
    }
    // The two that ran had two more tokens to go.
    assert!(others <= 2, "{others} steps went by");
    run.finish();
    assert_eq!(run.outputs.len(), 21);
}

#[test]
fn a_weight_of_nothing_is_refused() {
    let mut run = Run::new(16, 1, 64);
    let error = run.scheduler.set_weight(3, 0).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("weight"));
}
