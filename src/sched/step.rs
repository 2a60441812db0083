//! One step of the model: what to compute and what to sample, as flat arrays that a device can take as they are.

use std::sync::Arc;

use super::sampling::uniform;
use super::sequence::Sequence;

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    /// The sequence.
    pub id: u64,
    /// Tokens of it that this step computes.
    pub new_tokens: usize,
    /// Whether its next token is sampled.
    pub samples: bool,
}

/// The arrays of one step; sequences lie one after another in the token arrays. Reused from step to step. The names and
/// meanings are those of `StepBuffers` and `Extras` in `lmserve/model/interface.py`.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct Step {
    pub scheduled: Vec<Scheduled>,
    pub token_ids: Vec<i32>,
    pub positions: Vec<i32>,
    pub slots: Vec<i32>,
    pub query_start: Vec<i32>,
    pub context_lens: Vec<i32>,
    /// Block ids of each sequence, in order.
    pub block_tables: Vec<Arc<Vec<u32>>>,
    pub sample_rows: Vec<i32>,
    pub temperature: Vec<f32>,
    pub top_k: Vec<i32>,
    pub top_p: Vec<f32>,
    pub min_p: Vec<f32>,
    pub repetition_penalty: Vec<f32>,
    pub presence_penalty: Vec<f32>,
    pub frequency_penalty: Vec<f32>,
    pub uniform: Vec<f32>,
    pub logprobs: Vec<i32>,
    pub bias_start: Vec<i32>,
    pub bias_token: Vec<i32>,
    pub bias_value: Vec<f32>,
    pub seen_start: Vec<i32>,
    pub seen_token: Vec<i32>,
    pub seen_count: Vec<i32>,
}

impl Step {
    /// Sequences in the step.
    pub fn num_sequences(&self) -> usize {
        self.scheduled.len()
    }

    /// Tokens in the step.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Sampled rows of the step.
    pub fn num_rows(&self) -> usize {
        self.sample_rows.len()
    }

    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.scheduled.is_empty()
    }

    /// Whether some row has a bias or a penalty.
    pub fn has_extras(&self) -> bool {
        !self.bias_token.is_empty() || !self.seen_token.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.scheduled.clear();
        for array in [
            &mut self.token_ids,
            &mut self.positions,
            &mut self.slots,
            &mut self.query_start,
            &mut self.context_lens,
            &mut self.sample_rows,
            &mut self.top_k,
            &mut self.logprobs,
            &mut self.bias_start,
            &mut self.bias_token,
            &mut self.seen_start,
            &mut self.seen_token,
            &mut self.seen_count,
        ] {
            array.clear();
        }
        for array in [
            &mut self.temperature,
            &mut self.top_p,
            &mut self.min_p,
            &mut self.repetition_penalty,
            &mut self.presence_penalty,
            &mut self.frequency_penalty,
            &mut self.uniform,
            &mut self.bias_value,
        ] {
            array.clear();
        }
        self.block_tables.clear();
        self.query_start.push(0);
        self.bias_start.push(0);
        self.seen_start.push(0);
    }

    /// Adds the next `new_tokens` tokens of `sequence`, whose table has room for them.
    pub(super) fn add(&mut self, sequence: &Sequence, new_tokens: usize) {
        let end = sequence.computed + new_tokens;
        for position in sequence.computed..end {
            self.token_ids.push(sequence.tokens[position] as i32);
            self.positions.push(position as i32);
            self.slots.push(sequence.table.slot(position) as i32);
        }
        self.query_start.push(self.token_ids.len() as i32);
        self.context_lens.push(end as i32);
        self.block_tables.push(sequence.table.snapshot());
        let samples = sequence.wants_sample() && end == sequence.tokens.len();
        if samples {
            self.add_row(sequence);
        }
        self.scheduled.push(Scheduled {
            id: sequence.id(),
            new_tokens,
            samples,
        });
    }

    fn add_row(&mut self, sequence: &Sequence) {
        let s = &sequence.new.sampling;
        self.sample_rows.push(self.token_ids.len() as i32 - 1);
        self.temperature.push(s.temperature);
        self.top_k.push(s.top_k as i32);
        self.top_p.push(s.top_p);
        self.min_p.push(s.min_p);
        self.repetition_penalty.push(s.repetition_penalty);
        self.presence_penalty.push(s.presence_penalty);
        self.frequency_penalty.push(s.frequency_penalty);
        self.uniform
            .push(uniform(sequence.new.seed, sequence.tokens.len() as u64));
        self.logprobs.push(s.logprobs.map_or(-1, |k| k as i32));
        for &(token, bias) in &s.logit_bias {
            self.bias_token.push(token as i32);
            self.bias_value.push(bias);
        }
        if sequence.output().len() < sequence.new.min_tokens {
            for &token in sequence.new.stop_tokens.iter() {
                self.bias_token.push(token as i32);
                self.bias_value.push(f32::NEG_INFINITY);
            }
        }
        self.bias_start.push(self.bias_token.len() as i32);
        if let Some(seen) = &sequence.seen {
            self.seen_token.extend_from_slice(seen.tokens());
            self.seen_count.extend_from_slice(seen.counts());
        }
        self.seen_start.push(self.seen_token.len() as i32);
    }
}
