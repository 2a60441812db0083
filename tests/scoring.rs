//! Prompts whose tokens are scored, beside others: each token once and in order, within the rows of a step.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::toy_sequences::{VOCAB, alone, sequence};
use lmserve::engine::{Executor, StepOutput};
use lmserve::kv::BlockPool;
use lmserve::sched::{FinishReason, NewSequence, Scheduler, SchedulerConfig, StepTokens};
use lmserve::sim::ToyModel;
use proptest::prelude::*;

const MAX_BATCH: usize = 4;

/// The scored tokens of each sequence, as the model saw them.
struct Scores<'a> {
    sampled: &'a [u32],
    tokens: HashMap<u64, Vec<u32>>,
}

impl StepTokens for Scores<'_> {
    fn on_token(
        &mut self,
        _: u64,
        _: usize,
        _: u32,
        _: Option<FinishReason>,
    ) -> Option<FinishReason> {
        None
    }

    fn on_prompt_token(&mut self, id: u64, row: usize, token: u32) {
        assert_eq!(self.sampled[row], token);
        self.tokens.entry(id).or_default().push(token);
    }
}

fn scored(id: u64, prompt: Vec<u32>, max_tokens: usize, scored: bool) -> NewSequence {
    NewSequence {
        prompt_logprobs: scored.then_some(0),
        ..sequence(id, prompt, max_tokens)
    }
}

/// Runs all to their end; the scored tokens and all tokens of each.
fn run(
    num_blocks: usize,
    requests: Vec<NewSequence>,
) -> (HashMap<u64, Vec<u32>>, HashMap<u64, Vec<u32>>) {
    let config = SchedulerConfig {
        max_batch: MAX_BATCH,
        max_batch_tokens: 24,
        max_model_len: 64,
        max_queue: 100,
    };
    let pool = Arc::new(BlockPool::new(num_blocks, 4, true));
    let mut scheduler = Scheduler::new(config, pool).unwrap();
    let mut model = ToyModel::new(num_blocks, 4, VOCAB);
    let mut output = StepOutput::default();
    let (mut scored, mut results) = (HashMap::new(), HashMap::new());
    for request in requests {
        scheduler.add(request).unwrap();
    }
    while !scheduler.is_idle() {
        let step = scheduler.plan();
        assert!(!step.is_empty());
        assert!(step.num_rows() <= MAX_BATCH);
        model.launch(step).unwrap();
        model.collect(step, &mut output).unwrap();
        let mut scores = Scores {
            sampled: &output.tokens,
            tokens: scored,
        };
        let mut finished = Vec::new();
        scheduler
            .commit(&output.tokens, &mut scores, &mut finished)
            .unwrap();
        scored = scores.tokens;
        for end in finished {
            results.insert(end.sequence.id(), end.sequence.tokens().to_vec());
        }
    }
    (scored, results)
}

#[test]
fn a_prompt_that_is_known_is_computed_again_to_score_it() {
    let prompt: Vec<u32> = (1..20).collect();
    for scored in [false, true] {
        let (scores, results) = run(
            64,
            vec![
                sequence(1, prompt.clone(), 2),
                self::scored(2, prompt.clone(), 0, scored),
            ],
        );
        assert_eq!(results.len(), 2);
        assert_eq!(scores.contains_key(&2), scored);
    }
}

#[test]
fn a_prompt_of_one_token_has_nothing_to_score() {
    let (scores, results) = run(64, vec![scored(1, vec![7], 3, true)]);
    assert!(scores.is_empty());
    assert_eq!(results[&1], alone(&[7], 3));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn each_token_is_scored_once_whatever_runs_beside_it(
        loads in prop::collection::vec((prop::collection::vec(0..VOCAB as u32, 1..30), 0_usize..12, any::<bool>()), 1..10),
        num_blocks in 12_usize..40,
    ) {
        let requests = loads.iter().enumerate().map(|(id, (prompt, max_tokens, scored))| {
            self::scored(id as u64, prompt.clone(), *max_tokens, *scored)
        });
        let (scores, results) = run(num_blocks, requests.collect());
        for (id, (prompt, max_tokens, scored)) in loads.iter().enumerate() {
            prop_assert_eq!(&results[&(id as u64)], &alone(prompt, *max_tokens));
            let expected = if *scored { &prompt[1..] } else { &[] };
            let given = scores.get(&(id as u64)).map_or(&[][..], Vec::as_slice);
            prop_assert_eq!(given, expected);
        }
    }
}
