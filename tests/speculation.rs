//! Speculative decoding gives what decoding gives, row by row, and takes nothing from anybody.

mod common;

use std::sync::Arc;

use common::toy_sequences::{self, VOCAB};
use lmserve::engine::{Executor, StepOutput};
use lmserve::kv::BlockPool;
use lmserve::request::SamplingParams;
use lmserve::sched::{
    FinishReason, NewSequence, Scheduler, SchedulerConfig, Speculation, Stats, Step, StepTokens,
};
use lmserve::sim::ToyModel;

/// How a token was sampled: everything that a sampler is told of its row.
#[derive(Debug, PartialEq)]
struct Row {
    position: i32,
    token: u32,
    parameters: [f32; 7],
    top_k: i32,
    biases: Vec<(i32, f32)>,
    seen: Vec<(i32, i32)>,
}

fn row(step: &Step, row: usize, token: u32) -> Row {
    let range = |start: &[i32]| start[row] as usize..start[row + 1] as usize;
    let biases = range(&step.bias_start).map(|at| (step.bias_token[at], step.bias_value[at]));
    let seen = range(&step.seen_start).map(|at| (step.seen_token[at], step.seen_count[at]));
    Row {
        position: step.positions[step.sample_rows[row] as usize],
        token,
        parameters: [
            step.temperature[row],
            step.top_p[row],
            step.min_p[row],
            step.repetition_penalty[row],
            step.presence_penalty[row],
            step.frequency_penalty[row],
            step.uniform[row],
        ],
        top_k: step.top_k[row],
        biases: biases.collect(),
        seen: seen.collect(),
    }
}

#[derive(Default)]
struct Rows(Vec<(u64, usize, u32)>);

impl StepTokens for Rows {
    fn on_token(
        &mut self,
        id: u64,
        row: usize,
        token: u32,
        _: Option<FinishReason>,
    ) -> Option<FinishReason> {
        self.0.push((id, row, token));
        None
    }

    fn on_prompt_token(&mut self, _: u64, _: usize, _: u32) {}
}

struct Outcome {
    /// By sequence.
    rows: Vec<Vec<Row>>,
    reasons: Vec<Option<FinishReason>>,
    stats: Stats,
    largest_rows: usize,
}

const FREE: Speculation = Speculation {
    max_draft: 6,
    max_rows: 32,
    row_cost: 0.0,
};

fn run(sequences: &[NewSequence], num_blocks: usize, speculation: Option<Speculation>) -> Outcome {
    run_timed(sequences, num_blocks, speculation, None)
}

/// `row_cost`: what a row adds to the time of a step that the scheduler is told of.
fn run_timed(
    sequences: &[NewSequence],
    num_blocks: usize,
    speculation: Option<Speculation>,
    row_cost: Option<f64>,
) -> Outcome {
    let pool = BlockPool::new(num_blocks, 4, true);
    let model = ToyModel::new(num_blocks, 4, VOCAB);
    run_on(sequences, (pool, model), speculation, row_cost)
}

fn run_on(
    sequences: &[NewSequence],
    (pool, mut model): (BlockPool, ToyModel),
    speculation: Option<Speculation>,
    row_cost: Option<f64>,
) -> Outcome {
    let config = SchedulerConfig {
        max_batch: 4,
        max_batch_tokens: 64,
        max_model_len: 512,
        max_queue: 100,
    };
    let scheduler = Scheduler::new(config, Arc::new(pool)).unwrap();
    let mut scheduler = scheduler.with_speculation(speculation);
    let mut outcome = Outcome {
        rows: sequences.iter().map(|_| Vec::new()).collect(),
        reasons: vec![None; sequences.len()],
        stats: Stats::default(),
        largest_rows: 0,
    };
    for sequence in sequences {
        scheduler.add(sequence.clone()).unwrap();
    }
    let (mut output, mut finished) = (StepOutput::default(), Vec::new());
    while !scheduler.is_idle() {
        let step = scheduler.plan();
        model.launch(step).unwrap();
        model.collect(step, &mut output).unwrap();
        outcome.largest_rows = outcome.largest_rows.max(step.num_rows());
        let all = output.tokens.iter().enumerate();
        let mut told: Vec<Option<Row>> = all.map(|(at, &t)| Some(row(step, at, t))).collect();
        let mut rows = Rows::default();
        if let Some(row_cost) = row_cost {
            let seconds = row_cost.mul_add(scheduler.step().num_rows() as f64, 1.0) / 1e3;
            scheduler.note_time(seconds);
        }
        scheduler.note_guesses(&output.guesses);
        scheduler
            .commit(&output.tokens, &mut rows, &mut finished)
            .unwrap();
        for (id, at, token) in rows.0 {
            let row = told[at].take().unwrap();
            assert_eq!(row.token, token);
            outcome.rows[id as usize].push(row);
        }
        for end in finished.drain(..) {
            outcome.reasons[end.sequence.id() as usize] = Some(end.reason);
        }
    }
    assert_eq!(scheduler.pool().counts().owned, 0);
    outcome.stats = scheduler.stats();
    outcome
}

fn sequence(id: u64, max_tokens: usize) -> NewSequence {
    let prompt = (0..20).map(|i| (i + id as u32) % 7).collect();
    NewSequence {
        seed: 11 * id,
        ..toy_sequences::sequence(id, prompt, max_tokens)
    }
}

/// One of each kind, so that each row's biases, penalties and randomness are looked at.
fn kinds() -> Vec<NewSequence> {
    let penalized = SamplingParams {
        repetition_penalty: 1.3,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        ..SamplingParams::default()
    };
    let biased = SamplingParams {
        temperature: 0.5,
        logit_bias: vec![(3, 1.5), (4, -2.0)],
        ..SamplingParams::default()
    };
    vec![
        sequence(0, 120),
        NewSequence {
            sampling: penalized,
            ..sequence(1, 100)
        },
        NewSequence {
            sampling: biased,
            min_tokens: 60,
            stop_tokens: Arc::new([5, 6, 7]),
            ..sequence(2, 90)
        },
        NewSequence {
            stop_tokens: Arc::new([41]),
            ..sequence(3, 200)
        },
    ]
}

#[test]
fn every_row_is_sampled_as_it_would_be_alone() {
    let (plain, drafted) = (run(&kinds(), 128, None), run(&kinds(), 128, Some(FREE)));
    assert_eq!(plain.rows, drafted.rows);
    assert_eq!(plain.reasons, drafted.reasons);
    assert_eq!(plain.stats.sampled_tokens, drafted.stats.sampled_tokens);
    assert_eq!(plain.stats.drafted_tokens, 0);
    let stats = drafted.stats;
    assert!(stats.accepted_tokens > 20 && stats.accepted_tokens < stats.drafted_tokens);
    assert!(stats.steps < plain.stats.steps);
}

/// The model's own guesses alone, which are right about every other time.
const GUESSES: Speculation = Speculation {
    max_draft: 0,
    ..FREE
};

#[test]
fn what_the_model_guesses_itself_is_checked_as_any_draft() {
    let plain = run(&kinds(), 128, None);
    for speculation in [GUESSES, FREE] {
        let pool = BlockPool::new(128, 4, true);
        let model = ToyModel::new(128, 4, VOCAB).with_guesses(true);
        let guessed = run_on(&kinds(), (pool, model), Some(speculation), None);
        assert_eq!(plain.rows, guessed.rows);
        assert_eq!(plain.reasons, guessed.reasons);
        let stats = guessed.stats;
        let (drafted, accepted) = (stats.mtp_drafted_tokens, stats.mtp_accepted_tokens);
        assert!(accepted > 20 && accepted < drafted);
        assert!(stats.steps < plain.stats.steps);
        // Text that repeats itself is drafted from the text, where there is such drafting.
        let alone = speculation.max_draft == 0;
        assert_eq!(drafted == stats.drafted_tokens, alone);
    }
}

#[test]
fn guesses_that_are_right_too_seldom_for_their_cost_are_soon_not_drafted() {
    let pool = BlockPool::new(128, 4, true);
    let model = ToyModel::new(128, 4, VOCAB).with_guesses(true);
    let dear = Speculation {
        row_cost: 2.0,
        ..GUESSES
    };
    let outcome = run_on(&kinds()[..1], (pool, model), Some(dear), Some(2.0));
    let stats = outcome.stats;
    assert!(stats.mtp_drafted_tokens > 0);
    assert!(stats.mtp_drafted_tokens < stats.sampled_tokens / 4);
}

#[test]
fn no_state_goes_beyond_a_guess() {
    let plain = run(&kinds(), 128, None);
    for slots in [4, 9] {
        for every in [7, 1000] {
            let pool = BlockPool::new(128, 4, true).with_states(slots, every);
            let model = ToyModel::new(128, 4, VOCAB).with_states(slots);
            let drafted = run_on(&kinds(), (pool, model), Some(FREE), None);
            assert_eq!(plain.rows, drafted.rows);
            assert_eq!(plain.reasons, drafted.reasons);
            let stats = drafted.stats;
            assert!(stats.accepted_tokens > 20 && stats.accepted_tokens < stats.drafted_tokens);
            // A step ends where a snapshot is taken, also among what is computed again.
            assert!(every == 7 || stats.steps < plain.stats.steps);
        }
    }
}

#[test]
fn drafts_are_bounded_and_end_with_the_answer() {
    let speculation = Speculation {
        max_draft: 3,
        ..FREE
    };
    let outcome = run(&kinds(), 128, Some(speculation));
    assert!(outcome.largest_rows > 4 && outcome.largest_rows <= 16);
    let few = Speculation {
        max_rows: 5,
        ..FREE
    };
    assert_eq!(run(&kinds(), 128, Some(few)).largest_rows, 5);
    // The prompt's step samples the first token; the row after the last draft that could be right samples the last one.
    let largest = (1..6).map(|max_tokens| {
        let outcomes = (0..7).map(|first| {
            let prompt = (0..20).map(|i| (i + first) % 7).collect();
            let new = NewSequence {
                prompt,
                ..sequence(0, max_tokens)
            };
            run(&[new], 128, Some(FREE))
        });
        let rows = outcomes.map(|outcome| {
            assert_eq!(outcome.rows[0].len(), max_tokens);
            outcome.largest_rows
        });
        rows.max().unwrap()
    });
    assert_eq!(largest.collect::<Vec<_>>(), [1, 1, 2, 3, 4]);
}

#[test]
fn stop_tokens_are_held_off_until_min_tokens_in_drafts_too() {
    for min_tokens in 5..40 {
        let held = NewSequence {
            min_tokens,
            stop_tokens: Arc::new([5, 6]),
            ..sequence(0, 60)
        };
        let held = [held];
        let (plain, drafted) = (run(&held, 128, None), run(&held, 128, Some(FREE)));
        assert_eq!(plain.rows, drafted.rows);
        let biased = |row: &&Row| row.biases.len() == 2;
        assert_eq!(drafted.rows[0].iter().filter(biased).count(), min_tokens);
    }
}

#[test]
fn what_steps_take_decides_how_much_is_drafted() {
    let sequences: Vec<NewSequence> = (0..4)
        .map(|id| sequence(id, 100 + 50 * id as usize))
        .collect();
    let assume = |row_cost| Speculation { row_cost, ..FREE };
    let drafted = |assumed, row_cost| {
        let outcome = run_timed(&sequences, 256, Some(assume(assumed)), row_cost);
        outcome.stats.drafted_tokens
    };
    let (all, few) = (drafted(0.0, None), drafted(1.0, None));
    assert!(few * 3 < all, "{few} of {all}");
    // Whatever was assumed, as soon as the rows of steps vary.
    assert!(drafted(0.01, Some(1.0)) * 2 < all);
    assert!(drafted(1.0, Some(0.0)) > 2 * few);
}

#[test]
fn guided_sequences_are_not_drafted() {
    let guided = NewSequence {
        guided: true,
        ..sequence(0, 100)
    };
    assert_eq!(run(&[guided], 128, Some(FREE)).stats.drafted_tokens, 0);
}

#[test]
fn drafts_take_no_block_that_another_needs() {
    // Each fits alone with two blocks to spare. They join because all before were short.
    let long = (20..24).map(|id| NewSequence {
        stop_tokens: Arc::new([VOCAB as u32]),
        ..sequence(id, 100)
    });
    let sequences: Vec<NewSequence> = toy_sequences::short_answers(0..20).chain(long).collect();
    let (plain, drafted) = (run(&sequences, 32, None), run(&sequences, 32, Some(FREE)));
    assert_eq!(plain.rows, drafted.rows);
    assert!(plain.stats.preemptions > 0);
    // A sequence that fills the pool to the last token.
    let full = run(&[sequence(0, 108)], 32, Some(FREE));
    assert_eq!(full.rows[0].len(), 108);
    assert_eq!(full.stats.preemptions, 0);
    assert!(full.stats.accepted_tokens > 0);
}
