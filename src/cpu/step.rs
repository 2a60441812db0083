//! The input of a step, and the checks that it fits the model.

use super::architecture::ModelShape;
use super::attention::{PAGE, SeqSpan, Sequence};
use super::memory::SharedSlice;
use super::recurrent::{self, StateSpan};
use super::sample::{LogitEdits, SampleRows, Sampled, TokenMasks};
use crate::error::{Error, Result};

/// The input of a step: T tokens of S sequences, and R rows to sample; see `StepBuffers` of `lmserve/model/interface.py`.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct StepInput<'a> {
    pub token_ids: &'a [i32],
    pub positions: &'a [i32],
    /// For texts that are embedded: each token's row of the tables that
    /// [`Model::record_embed_places`](super::Model::record_embed_places) reads.
    pub places: &'a [i32],
    pub slots: &'a [i32],
    pub query_start: &'a [i32],
    pub context_lens: &'a [i32],
    /// `stride` block ids for each sequence.
    pub block_tables: &'a [i32],
    pub stride: usize,
    /// `slots` and `block_tables` in the blocks of layers with a sliding window, for models with such layers.
    pub window_slots: &'a [i32],
    pub window_tables: &'a [i32],
    pub sample_rows: &'a [i32],
    /// For programs that predict tokens, one for each sequence: the token after its last one of the step. -1: it will be sampled,
    /// or is unknown.
    pub next_tokens: &'a [i32],
    /// For models with recurrent layers, one for each sequence: the slot with its state. -1: the sequence begins.
    pub state_from: &'a [i32],
    /// The slot for its new state.
    pub state_to: &'a [i32],
    /// Number of its tokens that the new state includes. The tokens after them are drafts.
    pub state_tokens: &'a [i32],
    /// The block whose tokens before the sequence's first one of the step are copied to its own block. -1: none.
    pub copied_blocks: &'a [i32],
    /// The number of each sequence's adapter. 0: none. Empty: no sequence has one.
    pub adapters: &'a [i32],
}

/// How a step's rows are sampled, and where the outcome is written.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct StepSampling<'a> {
    pub rows: SampleRows<'a>,
    pub edits: Option<&'a LogitEdits>,
    pub masks: Option<&'a dyn TokenMasks>,
    pub out: Sampled<'a>,
    /// For programs that predict tokens, one for each row: the token that may follow the sampled one.
    pub drafts: SharedSlice<'a, i32>,
}

impl StepInput<'_> {
    /// The step's sequences, after checking that everything lies within the model.
    pub(super) fn spans(
        &self,
        shape: &ModelShape,
        (pages, window_pages): (usize, usize),
    ) -> Result<Vec<SeqSpan<'_>>> {
        let windowed = shape.num_window_blocks > 0;
        let sequences = self.context_lens.len();
        let positions = shape.positions;
        let tokens = self.token_ids.len();
        let within =
            |values: &[i32], limit: usize| values.iter().all(|&v| v >= 0 && (v as usize) < limit);
        check(
            within(self.token_ids, shape.vocab_size),
            "a token id",
            shape.vocab_size,
        )?;
        check(within(self.positions, positions), "a position", positions)?;
        check(within(self.slots, pages * PAGE), "a slot", pages * PAGE)?;
        let window_slots = within(self.window_slots, window_pages * PAGE);
        check(
            !windowed || (window_slots && self.window_slots.len() == tokens),
            "a slot of a window",
            window_pages * PAGE,
        )?;
        check(within(self.sample_rows, tokens), "a sampled row", tokens)?;
        let mut spans = Vec::with_capacity(sequences);
        for s in 0..sequences {
            let (first, last) = (
                self.query_start[s] as usize,
                self.query_start[s + 1] as usize,
            );
            let context = self.context_lens[s] as usize;
            let blocks = context.div_ceil(shape.block_size);
            check(
                first < last && last <= tokens && last - first <= context,
                "a sequence's end",
                tokens,
            )?;
            check(
                blocks <= self.stride && context <= positions,
                "a context",
                positions,
            )?;
            let own = s * self.stride..s * self.stride + blocks;
            let sequence = |table, pages: usize| {
                let num_blocks = pages * PAGE / shape.block_size;
                check(within(table, num_blocks), "a block id", num_blocks)?;
                Ok(Sequence {
                    table,
                    block_size: shape.block_size,
                })
            };
            let all = sequence(&self.block_tables[own.clone()], pages)?;
            spans.push(SeqSpan {
                sequence: all,
                window: if windowed {
                    sequence(&self.window_tables[own], window_pages)?
                } else {
                    all
                },
                first_token: first,
                tokens: last - first,
                context,
            });
        }
        Ok(spans)
    }

    /// The pages to copy before the step: from, to, and how many. Call it after [`Self::spans`].
    pub(super) fn copied_pages(
        &self,
        shape: &ModelShape,
        pages: usize,
    ) -> Result<Vec<(usize, usize, usize)>> {
        let of_block = shape.block_size / PAGE;
        let mut copies = Vec::new();
        for (s, &source) in self.copied_blocks.iter().enumerate() {
            let Ok(source) = usize::try_from(source) else {
                continue;
            };
            check(source * of_block < pages, "a block id", pages / of_block)?;
            let position = self.positions[self.query_start[s] as usize] as usize;
            let own = self.block_tables[s * self.stride + position / shape.block_size] as usize;
            let count = (position % shape.block_size).div_ceil(PAGE);
            copies.push((source * of_block, own * of_block, count));
        }
        Ok(copies)
    }

    /// Writes the next token of each token, as far as it is known before the step is sampled. Call it after [`Self::spans`].
    pub(super) fn write_next(&self, shape: &ModelShape, next: &mut [i32]) -> Result<()> {
        let (sequences, vocab) = (self.context_lens.len(), shape.vocab_size);
        let known = |&token: &i32| token >= -1 && i64::from(token) < vocab as i64;
        check(
            self.next_tokens.len() == sequences && self.next_tokens.iter().all(known),
            "a next token",
            vocab,
        )?;
        if let Some((_, rest)) = self.token_ids.split_first() {
            next[..rest.len()].copy_from_slice(rest);
        }
        for (end, &token) in self.query_start[1..].iter().zip(self.next_tokens) {
            next[*end as usize - 1] = token.max(0);
        }
        Ok(())
    }

    /// The states that the step's sequences read and write, in a model with recurrent layers. Call it after [`Self::spans`].
    pub(super) fn state_spans(&self, shape: &ModelShape, slots: usize) -> Result<Vec<StateSpan>> {
        if shape.recurrent.is_empty() {
            return Ok(Vec::new());
        }
        let own = (self.state_from, self.state_to);
        recurrent::spans(self.query_start, self.state_tokens, own, slots)
    }
}

fn check(holds: bool, what: &str, limit: usize) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::internal(format!(
        "{what} of the step lies outside of the {limit} there are"
    )))
}
