//! One step of the model: what to compute and what to sample, as flat arrays that a device can take as they are.

use std::sync::Arc;

use super::grant::Grant;
use super::sampling::{SeenTokens, uniform};
use super::sequence::Sequence;
use crate::guided::StepMasks;
use crate::kv::TableWindow;
use crate::request::SamplingParams;

/// What lifts a token's logit above all others.
const FORCED: f32 = 1e30;

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    /// The sequence.
    pub id: u64,
    /// Tokens of it that this step computes.
    pub new_tokens: usize,
    /// Rows that score tokens of its prompt; they come before the sampled one.
    pub prompt_rows: usize,
    /// Whether its next token is sampled.
    pub samples: bool,
    /// Tokens beyond the known ones that are computed too, each with a row that says what follows it.
    pub drafts: usize,
}

/// The arrays of one step; sequences lie one after another in the token arrays. Reused from step to step. The names and
/// meanings are those of `StepBuffers` and `LogitEdits` in `lmserve/model/interface.py`.
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
    /// Of models with layers that have a window, as the next one: where each token's K and V go in these layers.
    pub window_slots: Vec<i32>,
    /// The window blocks of each sequence.
    pub window_tables: Vec<TableWindow>,
    pub sample_rows: Vec<i32>,
    /// Of each sequence the token after its last one here; -1: it is sampled here, or there is none.
    pub next_tokens: Vec<i32>,
    /// Of models with recurrent layers, as the next three.
    pub state_from: Vec<i32>,
    pub state_to: Vec<i32>,
    pub state_tokens: Vec<i32>,
    pub copied_blocks: Vec<i32>,
    /// Of each sequence.
    pub adapters: Vec<i32>,
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
    /// Of a model that guesses ahead, once the step is computed: the token that may follow each sampled row's.
    pub guesses: Vec<u32>,
    /// Sampled rows whose tokens follow a grammar, ascending, with their sequences.
    pub guided: Vec<(usize, u64)>,
    /// The masks of these rows.
    pub masks: Option<Arc<StepMasks>>,
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

    /// Whether some row has a bias, a penalty or a mask.
    pub fn has_logit_edits(&self) -> bool {
        !self.bias_token.is_empty() || !self.seen_token.is_empty() || self.masks.is_some()
    }

    pub(super) fn clear(&mut self) {
        self.scheduled.clear();
        for array in [
            &mut self.token_ids,
            &mut self.positions,
            &mut self.slots,
            &mut self.window_slots,
            &mut self.query_start,
            &mut self.context_lens,
            &mut self.sample_rows,
            &mut self.next_tokens,
            &mut self.state_from,
            &mut self.state_to,
            &mut self.state_tokens,
            &mut self.copied_blocks,
            &mut self.adapters,
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
        self.window_tables.clear();
        self.guesses.clear();
        self.guided.clear();
        self.masks = None;
        self.query_start.push(0);
        self.bias_start.push(0);
        self.seen_start.push(0);
    }

    /// Adds what `sequence` is granted, for which its table has room.
    pub(super) fn add(&mut self, sequence: &Sequence, grant: &Grant) {
        let (new_tokens, drafts) = (grant.tokens, &grant.drafts);
        let end = sequence.computed + new_tokens;
        for position in sequence.computed..end {
            self.add_token(sequence, position, sequence.tokens[position]);
        }
        let prompt_rows = self.add_prompt_rows(sequence, end);
        for (position, &token) in (end..).zip(drafts) {
            self.add_token(sequence, position, token);
        }
        self.query_start.push(self.token_ids.len() as i32);
        self.context_lens.push((end + drafts.len()) as i32);
        let next = sequence.tokens.get(end).filter(|_| drafts.is_empty());
        self.next_tokens
            .push(next.map_or(-1, |&token| token as i32));
        self.adapters.push(sequence.adapter() as i32);
        self.block_tables.push(sequence.table.snapshot());
        self.window_tables.extend(sequence.table.window().cloned());
        if let Some(state) = sequence.table.state_slots() {
            let number = |slot: Option<u32>| slot.map_or(-1, |slot| slot as i32);
            self.state_from.push(number(state.from));
            self.state_to.push(state.to as i32);
            self.state_tokens.push(new_tokens as i32);
            self.copied_blocks.push(number(state.copied_block));
        }
        let samples = sequence.wants_sample() && end == sequence.tokens.len();
        if samples {
            for known in 0..=drafts.len() {
                self.add_row(sequence, drafts, known);
            }
        }
        self.scheduled.push(Scheduled {
            id: sequence.id(),
            new_tokens,
            prompt_rows,
            samples,
            drafts: drafts.len(),
        });
    }

    fn add_token(&mut self, sequence: &Sequence, position: usize, token: u32) {
        self.token_ids.push(token as i32);
        self.positions.push(position as i32);
        self.slots.push(sequence.table.slot(position) as i32);
        let window_slot = sequence.table.window_slot(position);
        self.window_slots
            .extend(window_slot.map(|slot| slot as i32));
    }

    /// A prompt token is scored by a row that can only sample this token, so that the sampler needs no special case. Returns the number of
    /// rows.
    fn add_prompt_rows(&mut self, sequence: &Sequence, end: usize) -> usize {
        if !sequence.is_scoring() {
            return 0;
        }
        let sampling = SamplingParams {
            temperature: 0.0,
            logprobs: sequence.new.prompt_logprobs,
            ..SamplingParams::default()
        };
        let last = end.min(sequence.new.prompt.len() - 1);
        let first_row = self.token_ids.len() - (end - sequence.computed);
        let positions = sequence.next_scoring_position().max(sequence.computed)..last;
        let count = positions.len();
        for position in positions {
            self.push_row(first_row + position - sequence.computed, &sampling, 0.0);
            self.bias_token
                .push(sequence.new.prompt[position + 1] as i32);
            self.bias_value.push(FORCED);
            self.close_row(None, &[]);
        }
        count
    }

    /// A row that is sampled as if the first `known` drafts were tokens of the sequence.
    fn add_row(&mut self, sequence: &Sequence, drafts: &[u32], known: usize) {
        let s = &sequence.new.sampling;
        let uniform = uniform(sequence.new.seed, (sequence.tokens.len() + known) as u64);
        let token_row = self.token_ids.len() - 1 - (drafts.len() - known);
        self.push_row(token_row, s, uniform);
        for &(token, bias) in &s.logit_bias {
            self.bias_token.push(token as i32);
            self.bias_value.push(bias);
        }
        if sequence.new.guided {
            self.guided.push((self.num_rows() - 1, sequence.id()));
        } else if sequence.output().len() + known < sequence.new.min_tokens {
            for &token in sequence.new.stop_tokens.iter() {
                self.bias_token.push(token as i32);
                self.bias_value.push(f32::NEG_INFINITY);
            }
        }
        self.close_row(sequence.seen.as_ref(), &drafts[..known]);
    }

    fn push_row(&mut self, token_row: usize, s: &SamplingParams, uniform: f32) {
        self.sample_rows.push(token_row as i32);
        self.temperature.push(s.temperature);
        self.top_k.push(s.top_k as i32);
        self.top_p.push(s.top_p);
        self.min_p.push(s.min_p);
        self.repetition_penalty.push(s.repetition_penalty);
        self.presence_penalty.push(s.presence_penalty);
        self.frequency_penalty.push(s.frequency_penalty);
        self.uniform.push(uniform);
        self.logprobs.push(s.logprobs.map_or(-1, |k| k as i32));
    }

    /// Ends the row pushed last, once its biases are there; `drafts` count as seen in the output.
    fn close_row(&mut self, seen: Option<&SeenTokens>, drafts: &[u32]) {
        self.bias_start.push(self.bias_token.len() as i32);
        if let Some(seen) = seen {
            seen.append_with(drafts, &mut self.seen_token, &mut self.seen_count);
        }
        self.seen_start.push(self.seen_token.len() as i32);
    }
}
