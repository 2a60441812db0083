//! The low-rank updates of adapters to linear layers: for each row of a sequence with an adapter, the product of two matrices of
//! low rank (`LoRA`, Hu et al. 2021). A row's result does not depend on the other rows of its step.
#![allow(
    clippy::inline_always,
    reason = "what is not inlined is compiled without the instructions it is made for"
)]

use std::collections::HashMap;

use super::elementwise::AddRow;
use super::isa::Isa;
use super::memory::{Aligned, SharedSlice};
use super::op::Rows;
use super::pool::Team;
use super::program::LinearShape;
use super::simd::{Kernel, Simd, dispatch};
use super::step::StepInput;
use crate::error::{Error, Result};

/// Number of outputs of a unit of work.
const COLUMNS: usize = 256;

/// An adapter's update of some outputs of a linear layer.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// The first of these outputs.
    pub first: usize,
    /// Number of rows of both matrices.
    pub rank: usize,
    /// `[rank, in_features]`.
    pub down: &'a [f32],
    /// `[rank, outputs]`, scaled.
    pub up: &'a [f32],
}

/// The matrices of an update, stored.
struct Part {
    first: usize,
    rank: usize,
    outputs: usize,
    down: Aligned<f32>,
    up: Aligned<f32>,
}

/// The loaded adapters, by their numbers.
#[derive(Default)]
pub(super) struct Adapters {
    /// For each adapter: the updates of each weight that it changes.
    by_number: HashMap<u32, HashMap<usize, Vec<Part>>>,
    /// The maximum, over adapters and weights, of the sum of the ranks of a weight's updates.
    stride: usize,
    products: Aligned<f32>,
}

/// The adapters of a step.
pub(super) struct LowRankStep<'a> {
    by_number: &'a HashMap<u32, HashMap<usize, Vec<Part>>>,
    stride: usize,
    /// The token rows with an adapter: index of the row, and number of the adapter.
    tokens: Vec<(usize, u32)>,
    /// The sampled rows with an adapter.
    sampled: Vec<(usize, u32)>,
    /// The products of these rows with `down`.
    products: SharedSlice<'a, f32>,
}

impl Adapters {
    /// Loads the update of adapter `number` (not 0) for some outputs of a weight of this shape.
    ///
    /// # Errors
    /// `invalid_value` for matrices that do not fit the weight.
    pub(super) fn add(
        &mut self,
        number: u32,
        (weight, shape): (usize, LinearShape),
        part: LowRank,
    ) -> Result<()> {
        let LowRank {
            first,
            rank,
            down,
            up,
        } = part;
        let outputs = up.len() / rank.max(1);
        let fits = number > 0
            && rank > 0
            && down.len() == rank * shape.cols
            && up.len() == rank * outputs
            && first + outputs <= shape.out;
        if !fits {
            let message = format!(
                "{} and {} numbers of rank {rank} from output {first} on do not fit a layer [{}, {}]",
                down.len(),
                up.len(),
                shape.out,
                shape.cols
            );
            return Err(Error::invalid("adapter", message));
        }
        let parts = self.by_number.entry(number).or_default();
        let parts = parts.entry(weight).or_default();
        parts.push(Part {
            first,
            rank,
            outputs,
            down: Aligned::from_slice(down),
            up: Aligned::from_slice(up),
        });
        let ranks: usize = parts.iter().map(|part| part.rank).sum();
        self.stride = self.stride.max(ranks);
        Ok(())
    }

    /// Removes an adapter.
    pub(super) fn remove(&mut self, number: u32) {
        self.by_number.remove(&number);
    }

    /// Prepares a step. None if no sequence has an adapter.
    ///
    /// # Errors
    /// `internal_error` for an adapter that is not loaded.
    pub(super) fn begin(&mut self, step: &StepInput) -> Result<Option<LowRankStep<'_>>> {
        if step.adapters.iter().all(|&adapter| adapter == 0) {
            return Ok(None);
        }
        let (mut tokens, mut sampled) = (Vec::new(), Vec::new());
        for (s, &adapter) in step.adapters.iter().enumerate() {
            let number = adapter as u32;
            if number == 0 {
                continue;
            }
            if !self.by_number.contains_key(&number) {
                return Err(Error::internal(format!("adapter {number} is not loaded")));
            }
            let own = step.query_start[s]..step.query_start[s + 1];
            tokens.extend(own.clone().map(|token| (token as usize, number)));
            let rows = step.sample_rows.iter().enumerate();
            let rows = rows.filter(|(_, token)| own.contains(token));
            sampled.extend(rows.map(|(row, _)| (row, number)));
        }
        let needed = tokens.len().max(sampled.len()) * self.stride;
        if self.products.len() < needed {
            self.products = Aligned::zeroed(needed);
        }
        Ok(Some(LowRankStep {
            by_number: &self.by_number,
            stride: self.stride,
            tokens,
            sampled,
            products: SharedSlice::new(&mut self.products),
        }))
    }
}

impl LowRankStep<'_> {
    fn parts(&self, adapter: u32, weight: usize) -> &[Part] {
        let own = self.by_number.get(&adapter);
        let parts = own.and_then(|own| own.get(&weight));
        parts.map_or(&[], Vec::as_slice)
    }

    /// Adds the updates for `x` [rows, inputs] to `y` [rows, outputs]. Ends with a barrier, unless it does nothing.
    ///
    /// # Safety
    /// Until it returns on all threads, nobody may write `x`, and nobody else touch `y`.
    pub(super) unsafe fn add(
        &self,
        team: &Team,
        isa: Isa,
        weight: usize,
        rows: Rows,
        (x, inputs): (SharedSlice<f32>, usize),
        (y, outputs): (SharedSlice<f32>, usize),
    ) {
        let rows = match rows {
            Rows::Tokens => &self.tokens,
            Rows::Sampled => &self.sampled,
        };
        let is_changed = |&(_, adapter): &(usize, u32)| !self.parts(adapter, weight).is_empty();
        if !rows.iter().any(is_changed) {
            return;
        }
        let chunk = |units: usize| (units / (4 * team.size())).clamp(1, 64);
        let stride = self.stride;
        let lines = rows.len() * stride;
        team.for_chunks(lines, chunk(lines), |range| {
            for index in range {
                let (row, adapter) = rows[index / stride];
                let mut line = index % stride;
                for part in self.parts(adapter, weight) {
                    if line < part.rank {
                        // SAFETY: `x` is written; each product is written by one thread.
                        unsafe {
                            let dot = Dot {
                                a: x.get(row * inputs..(row + 1) * inputs),
                                b: &part.down[line * inputs..(line + 1) * inputs],
                            };
                            self.products.get_mut(index..index + 1)[0] = dispatch(isa, dot);
                        }
                        break;
                    }
                    line -= part.rank;
                }
            }
        });
        let blocks = outputs.div_ceil(COLUMNS);
        let units = rows.len() * blocks;
        team.for_chunks(units, chunk(units), |range| {
            for index in range {
                let (row, adapter) = rows[index / blocks];
                let from = (index % blocks) * COLUMNS;
                let mut line = index / blocks * stride;
                for part in self.parts(adapter, weight) {
                    let first = from.max(part.first);
                    let last = (from + COLUMNS).min(part.first + part.outputs);
                    // SAFETY: all products are written, and each block of outputs is one thread's.
                    unsafe {
                        part.add_to(
                            isa,
                            &self.products.part(line..line + part.rank),
                            y,
                            row * outputs,
                            first..last.max(first),
                        );
                    }
                    line += part.rank;
                }
            }
        });
    }
}

impl Part {
    /// Adds the outputs in `range` to the row that begins at `start`.
    ///
    /// # Safety
    /// Nobody may write `products`, and nobody else touch these outputs.
    unsafe fn add_to(
        &self,
        isa: Isa,
        products: &SharedSlice<f32>,
        y: SharedSlice<f32>,
        start: usize,
        range: std::ops::Range<usize>,
    ) {
        if range.is_empty() {
            return;
        }
        // SAFETY: the caller's promise.
        let (products, y) = unsafe {
            (
                products.get(0..self.rank),
                y.get_mut(start + range.start..start + range.end),
            )
        };
        let own = range.start - self.first..range.end - self.first;
        for (line, &product) in products.iter().enumerate() {
            let at = line * self.outputs;
            let add = AddRow {
                x: &self.up[at + own.start..at + own.end],
                scale: product,
                residual: &mut *y,
            };
            dispatch(isa, add);
        }
    }
}

/// The dot product of two rows of the same length.
struct Dot<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl Kernel for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 2];
        let (mut a, mut b) = (
            self.a.chunks_exact(2 * S::LANES),
            self.b.chunks_exact(2 * S::LANES),
        );
        for (a, b) in (&mut a).zip(&mut b) {
            // SAFETY: both chunks are two vectors.
            unsafe {
                let (first, second) = (s.load(a.as_ptr()), s.load(a.as_ptr().add(S::LANES)));
                sums = [
                    s.mul_add(first, s.load(b.as_ptr()), sums[0]),
                    s.mul_add(second, s.load(b.as_ptr().add(S::LANES)), sums[1]),
                ];
            }
        }
        let rest = a.remainder().iter().zip(b.remainder());
        s.sum(s.add(sums[0], sums[1])) + rest.map(|(a, b)| a * b).sum::<f32>()
    }
}

#[cfg(test)]
mod tests;
