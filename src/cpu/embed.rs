//! Embeddings of whole texts: one vector of the states of each. The KV cache and the states of sequences are not touched.

use std::ops::Range;

use super::attention::{KvCache, PAGE};
use super::model::Model;
use super::pooling::Pooling;
use super::program::Program;
use super::recurrent::StateCache;
use super::step::StepInput;
use crate::error::Result;

/// What is embedded: text `i` is `token_ids[cu_seqlens[i]..cu_seqlens[i + 1]]`.
#[derive(Debug, Clone, Copy)]
pub struct Texts<'a> {
    /// Of all texts.
    pub token_ids: &'a [i32],
    /// Their borders.
    pub cu_seqlens: &'a [i32],
    /// The token that ends the first of a text's two segments, and the rows that a table has for each segment; 0: one for each
    /// segment, whatever the position.
    pub separator: Option<(i32, usize)>,
}

impl Texts<'_> {
    /// Of the tokens of a text their rows in a table.
    fn places(&self, token_ids: &[i32]) -> Vec<i32> {
        let (separator, segment) = self.separator.unwrap_or((-1, token_ids.len()));
        let first = token_ids.iter().position(|&id| id == separator);
        let first = first.map_or(token_ids.len(), |end| end + 1);
        let row = |at: usize| match (at < first, segment) {
            (first, 0) => usize::from(!first),
            (true, _) => at,
            (false, segment) => segment + at,
        };
        (0..token_ids.len()).map(|at| row(at) as i32).collect()
    }
}

impl Model {
    /// `[n, hidden]`: the pooled states that `program` leaves for each text. At most `max_tokens` tokens, of as many texts as fit,
    /// are computed at once; a text whose tokens see what follows them is computed whole.
    ///
    /// # Errors
    /// As [`Model::run`].
    pub fn embed(
        &mut self,
        program: &Program,
        texts: &Texts,
        pooling: Pooling,
        max_tokens: usize,
    ) -> Result<Vec<f32>> {
        let given = texts;
        let (token_ids, cu_seqlens) = (given.token_ids, given.cu_seqlens);
        let max_tokens = max_tokens.max(1);
        let layers = &self.architecture.shape.layers;
        let whole = layers.iter().any(|layer| !layer.attention.causal);
        let mut embeddings = Vec::new();
        let bounds: Vec<usize> = cu_seqlens.iter().map(|&at| at as usize).collect();
        let mut texts = bounds.as_slice();
        while let [first, _, ..] = *texts {
            let fit = texts.partition_point(|&end| end <= first + max_tokens);
            let count = fit.saturating_sub(1).max(1);
            let block_size = self.architecture.shape.block_size;
            let batch = Batch::new(&texts[..=count], block_size);
            let pages = batch.blocks * (block_size / PAGE);
            let mut cache = KvCache::new(&self.architecture.cached, pages);
            let mut states_of_texts =
                StateCache::new(&self.architecture.shape.recurrent, batch.lens.len());
            let (mut states, mut width) = (Vec::new(), 0);
            let tokens = batch.lens.iter().sum();
            let at_once = if whole { tokens } else { max_tokens };
            let mut places = Vec::new();
            for text in texts[..=count].windows(2) {
                places.extend(given.places(&token_ids[text[0]..text[1]]));
            }
            for from in (0..tokens).step_by(at_once) {
                let part = from..tokens.min(from + at_once);
                let mut step = batch.step(part.clone());
                step.places = places[part.clone()].to_vec();
                let step = step.input(&token_ids[first + part.start..first + part.end]);
                let other = (&mut cache, &mut states_of_texts);
                let (value, rows) = self.run_states(program, &step, other)?;
                width = value.width;
                states.extend_from_slice(&rows[..part.len() * width]);
            }
            let mut states = states.as_slice();
            for len in batch.lens {
                let (own, rest) = states.split_at(len * width);
                let start = embeddings.len();
                embeddings.resize(start + width, 0.0);
                pooling.pool(own, &mut embeddings[start..]);
                states = rest;
            }
            texts = &texts[count..];
        }
        Ok(embeddings)
    }
}

/// Texts that are computed together: several short ones, or one of any length.
struct Batch {
    lens: Vec<usize>,
    block_size: usize,
    /// Blocks of all texts.
    blocks: usize,
    /// Blocks of the longest.
    stride: usize,
}

/// Some tokens of a batch: all, or a part of its only text.
struct Step {
    positions: Vec<i32>,
    places: Vec<i32>,
    slots: Vec<i32>,
    query_start: Vec<i32>,
    context_lens: Vec<i32>,
    block_tables: Vec<i32>,
    stride: usize,
    state_from: Vec<i32>,
    state_to: Vec<i32>,
    state_tokens: Vec<i32>,
}

impl Batch {
    fn new(bounds: &[usize], block_size: usize) -> Self {
        let lens: Vec<usize> = bounds.windows(2).map(|text| text[1] - text[0]).collect();
        let blocks = |len: &usize| len.div_ceil(block_size);
        Self {
            block_size,
            blocks: lens.iter().map(blocks).sum(),
            stride: lens.iter().map(blocks).max().unwrap_or(0),
            lens,
        }
    }

    /// The tokens `part`, which are those of whole texts or lie in one.
    fn step(&self, part: Range<usize>) -> Step {
        let mut step = Step {
            positions: Vec::with_capacity(part.len()),
            places: Vec::new(),
            slots: Vec::with_capacity(part.len()),
            query_start: vec![0],
            context_lens: Vec::with_capacity(self.lens.len()),
            block_tables: Vec::with_capacity(self.lens.len() * self.stride),
            stride: self.stride,
            state_from: Vec::with_capacity(self.lens.len()),
            state_to: (0..self.lens.len() as i32).collect(),
            state_tokens: Vec::with_capacity(self.lens.len()),
        };
        let (mut first, mut block) = (0, 0);
        for (text, &len) in self.lens.iter().enumerate() {
            let own = part.start.max(first) - first..part.end.min(first + len) - first;
            let slot = block * self.block_size;
            step.state_from
                .push(if own.start == 0 { -1 } else { text as i32 });
            step.state_tokens.push(own.len() as i32);
            step.positions.extend(own.clone().map(|at| at as i32));
            step.slots.extend(own.clone().map(|at| (slot + at) as i32));
            step.query_start.push(step.positions.len() as i32);
            step.context_lens.push(own.end as i32);
            let table = (block..block + self.stride).map(|block| block as i32);
            step.block_tables.extend(table);
            first += len;
            block += len.div_ceil(self.block_size);
        }
        step
    }
}

impl Step {
    fn input<'a>(&'a self, token_ids: &'a [i32]) -> StepInput<'a> {
        StepInput {
            token_ids,
            positions: &self.positions,
            places: &self.places,
            slots: &self.slots,
            query_start: &self.query_start,
            context_lens: &self.context_lens,
            block_tables: &self.block_tables,
            stride: self.stride,
            // The cache of the texts has as many blocks in all layers.
            window_slots: &self.slots,
            window_tables: &self.block_tables,
            sample_rows: &[],
            state_from: &self.state_from,
            state_to: &self.state_to,
            state_tokens: &self.state_tokens,
            copied_blocks: &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_of_positions_and_segments() {
        for (separator, expected) in [
            (None, [0, 1, 2, 3]),
            (Some((9, 50)), [0, 1, 52, 53]),
            (Some((9, 0)), [0, 0, 1, 1]),
            (Some((8, 50)), [0, 1, 2, 3]),
            (Some((-1, 0)), [0, 0, 0, 0]),
        ] {
            let texts = Texts {
                token_ids: &[],
                cu_seqlens: &[],
                separator,
            };
            assert_eq!(texts.places(&[5, 9, 9, 7]), expected, "{separator:?}");
        }
    }
}
