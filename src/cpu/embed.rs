//! Embeddings of whole texts, each pooled from the states of its tokens. This uses neither the KV cache nor the states of
//! sequences.

use std::ops::Range;

use super::attention::{KvCache, PAGE};
use super::model::Model;
use super::pooling::Pooling;
use super::program::Program;
use super::recurrent::StateCache;
use super::step::StepInput;
use crate::error::Result;

/// The texts to embed. Text `i` is `token_ids[cu_seqlens[i]..cu_seqlens[i + 1]]`.
#[derive(Debug, Clone)]
pub struct Texts {
    /// The tokens of all texts.
    pub token_ids: Vec<i32>,
    /// The positions where texts begin, and the end of the last one.
    pub cu_seqlens: Vec<i32>,
    /// The token that ends the first of a text's two segments, and the number of rows that a table has for each segment. 0: one row
    /// for each segment, whatever the position.
    pub separator: Option<(i32, usize)>,
}

impl Texts {
    /// The row of a table for each token of a text.
    fn places(&self, text: Range<usize>) -> Vec<i32> {
        let token_ids = &self.token_ids[text];
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

/// Texts that are embedded pass by pass. Between two passes, the model may compute something else.
pub struct EmbedPasses {
    texts: Texts,
    pooling: Pooling,
    max_tokens: usize,
    /// Number of texts that are done.
    done: usize,
    begun: Option<Begun>,
    embeddings: Vec<f32>,
}

/// A batch of which some tokens are computed.
struct Begun {
    batch: Batch,
    /// Its first token among all tokens.
    first: usize,
    places: Vec<i32>,
    cache: KvCache,
    recurrent: StateCache,
    computed: usize,
    states: Vec<f32>,
}

impl EmbedPasses {
    /// A pass computes at most `max_tokens` tokens, of as many texts as fit. A text whose tokens see later tokens is computed as a
    /// whole.
    pub fn new(texts: Texts, pooling: Pooling, max_tokens: usize) -> Self {
        Self {
            texts,
            pooling,
            max_tokens: max_tokens.max(1),
            done: 0,
            begun: None,
            embeddings: Vec::new(),
        }
    }

    /// The embeddings `[n, hidden]`, once all passes have run.
    pub fn into_embeddings(self) -> Vec<f32> {
        self.embeddings
    }

    /// The borders of the texts that are not done.
    fn left(&self) -> Vec<usize> {
        let borders = &self.texts.cu_seqlens[self.done.min(self.texts.cu_seqlens.len())..];
        borders.iter().map(|&at| at as usize).collect()
    }

    /// The next batch of texts. None if all are done.
    fn begin(&self, model: &Model) -> Option<Begun> {
        let left = self.left();
        let [first, _, ..] = *left else { return None };
        let fit = left.partition_point(|&end| end <= first + self.max_tokens);
        let borders = &left[..=fit.saturating_sub(1).max(1)];
        let shape = &model.architecture.shape;
        let batch = Batch::new(borders, shape.block_size);
        let texts = borders.windows(2);
        let places = texts.flat_map(|text| self.texts.places(text[0]..text[1]));
        Some(Begun {
            first,
            places: places.collect(),
            cache: KvCache::new(
                &model.architecture.cached,
                batch.blocks * (shape.block_size / PAGE),
            ),
            recurrent: StateCache::new(&shape.recurrent, batch.lens.len()),
            computed: 0,
            states: Vec::new(),
            batch,
        })
    }

    /// Runs one pass over the states that `program` computes. Returns true if no text remains.
    ///
    /// # Errors
    /// As [`Model::run`].
    pub fn run(&mut self, model: &mut Model, program: &Program) -> Result<bool> {
        let Some(mut begun) = self.begun.take().or_else(|| self.begin(model)) else {
            return Ok(true);
        };
        let layers = &model.architecture.shape.layers;
        let whole = layers.iter().any(|layer| !layer.attention.causal);
        let tokens = begun.places.len();
        let end = if whole {
            tokens
        } else {
            tokens.min(begun.computed + self.max_tokens)
        };
        let part = begun.computed..end;
        let mut step = begun.batch.step(part.clone());
        step.places = begun.places[part.clone()].to_vec();
        let ids = &self.texts.token_ids[begun.first + part.start..begun.first + part.end];
        let other = (&mut begun.cache, &mut begun.recurrent);
        let (value, rows) = model.run_states(program, &step.input(ids), other)?;
        let width = value.width;
        begun.states.extend_from_slice(&rows[..part.len() * width]);
        begun.computed = end;
        if end < tokens {
            self.begun = Some(begun);
            return Ok(false);
        }
        let mut states = begun.states.as_slice();
        for len in &begun.batch.lens {
            let (own, rest) = states.split_at(len * width);
            let start = self.embeddings.len();
            self.embeddings.resize(start + width, 0.0);
            self.pooling.pool(own, &mut self.embeddings[start..]);
            states = rest;
        }
        self.done += begun.batch.lens.len();
        Ok(self.left().len() < 2)
    }
}

/// Texts that are computed together: several short ones, or one of any length.
struct Batch {
    lens: Vec<usize>,
    block_size: usize,
    /// Number of blocks of all texts.
    blocks: usize,
    /// Number of blocks of the longest text.
    stride: usize,
}

/// The tokens of a pass: all of a batch, or a part of its only text.
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

    /// The pass over the tokens `part`: whole texts, or a part of one.
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
            // The temporary cache has the same blocks in all layers.
            window_slots: &self.slots,
            window_tables: &self.block_tables,
            next_tokens: &[],
            sample_rows: &[],
            state_from: &self.state_from,
            state_to: &self.state_to,
            state_tokens: &self.state_tokens,
            copied_blocks: &[],
            adapters: &[],
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
                token_ids: vec![5, 9, 9, 7],
                cu_seqlens: vec![0, 4],
                separator,
            };
            assert_eq!(texts.places(0..4), expected, "{separator:?}");
        }
    }
}
