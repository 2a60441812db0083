//! Linear layers by head: each head's columns of a row are multiplied by a matrix of their own.

use std::ops::Range;

use super::isa::Isa;
use super::linear::{Input, Linear, Matrix, QuantizedRows};
use super::memory::{Aligned, Plain, SharedSlice};
use super::pool::{Pool, Team};
use crate::error::{Error, Result};

const LINE_BYTES: usize = 64;
/// Number of rows that are quantized together.
const BLOCK: usize = 4;
/// Maximum number of rows of a unit of work.
const ROWS: usize = 64;
/// Number of tiles of a strip.
const TILES: usize = 3;
/// Number of units for each thread.
const UNITS: usize = 8;

/// The matrices of all heads, packed.
pub(super) struct HeadsWeight {
    heads: Vec<Linear>,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

/// Buffers for the rows of heads, kept from step to step.
#[derive(Default)]
pub(super) struct HeadsMemory {
    rows: Aligned<f32>,
    outputs: Aligned<f32>,
    records: Aligned<u8>,
}

/// The buffers as all threads see them: for each head, its rows one after the other.
pub(super) struct HeadsScratch<'a> {
    rows: SharedSlice<'a, f32>,
    outputs: SharedSlice<'a, f32>,
    records: SharedSlice<'a, u8>,
}

impl HeadsMemory {
    /// Grows the buffers for `rows` rows of these matrices.
    pub(super) fn reserve(&mut self, weight: &HeadsWeight, rows: usize) {
        let heads = weight.heads.len();
        if weight.heads.iter().any(Linear::is_quantized) {
            grow(&mut self.records, heads * weight.record_bytes(rows));
        }
        grow(&mut self.rows, heads * rows * weight.inputs);
        grow(&mut self.outputs, heads * rows * weight.outputs);
    }

    pub(super) fn share(&mut self) -> HeadsScratch<'_> {
        HeadsScratch {
            rows: SharedSlice::new(&mut self.rows),
            outputs: SharedSlice::new(&mut self.outputs),
            records: SharedSlice::new(&mut self.records),
        }
    }
}

fn grow<T: Plain>(buffer: &mut Aligned<T>, len: usize) {
    if buffer.len() < len {
        *buffer = Aligned::zeroed(len);
    }
}

impl HeadsWeight {
    /// Packs the matrices, each on one thread of the pool.
    ///
    /// # Errors
    /// `invalid_value` if there are none, they differ in shape, or their bytes do not fit.
    pub(super) fn pack(isa: Isa, pool: &Pool, matrices: &[Matrix]) -> Result<Self> {
        let shape = matrices.first().map(|first| (first.rows, first.columns));
        let like = |matrix: &Matrix| Some((matrix.rows, matrix.columns)) == shape;
        let Some((outputs, inputs)) = shape.filter(|_| matrices.iter().all(like)) else {
            return Err(Error::invalid(
                "model",
                "the matrices of all heads must have one shape",
            ));
        };
        Ok(Self {
            heads: Linear::pack_each(isa, pool, matrices)?,
            inputs,
            outputs,
        })
    }

    /// Heads that are packed already. `None` if there are none, or they differ in shape.
    pub(super) fn of(heads: Vec<Linear>) -> Option<Self> {
        let first = heads.first()?;
        let (outputs, inputs) = (first.out_features(), first.in_features());
        let like = |head: &Linear| (head.out_features(), head.in_features()) == (outputs, inputs);
        heads.iter().all(like).then_some(Self {
            heads,
            inputs,
            outputs,
        })
    }

    /// All matrices.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.heads.iter_mut()
    }

    /// Number of matrices.
    pub(super) fn count(&self) -> usize {
        self.heads.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.heads.iter().map(Linear::bytes).sum()
    }

    /// Bytes of one head's quantized rows.
    fn record_bytes(&self, rows: usize) -> usize {
        QuantizedRows::bytes(rows, self.inputs).next_multiple_of(LINE_BYTES)
    }

    fn records<'a>(
        &self,
        scratch: &HeadsScratch<'a>,
        head: usize,
        rows: usize,
    ) -> QuantizedRows<'a> {
        let bytes = self.record_bytes(rows);
        let records = scratch.records.part(head * bytes..(head + 1) * bytes);
        QuantizedRows::new(records, rows, self.inputs)
    }

    /// For each head of each row of `x`, with `width` columns per head: multiplies the first columns by the head's matrix, and
    /// copies the next `passed` columns. Every thread of the team must call it. It ends with a barrier.
    ///
    /// # Safety
    /// Until it returns on all threads, nobody may write `x`, and nobody else touch `out` or the scratch memory.
    pub(super) unsafe fn forward(
        &self,
        team: &Team,
        isa: Isa,
        (x, rows, width): (SharedSlice<f32>, usize, usize),
        passed: usize,
        scratch: &HeadsScratch,
        out: SharedSlice<f32>,
    ) {
        let (heads, inputs, outputs) = (self.heads.len(), self.inputs, self.outputs);
        let row_width = heads * width;
        let columns = |row: usize, head: usize| {
            let start = row * row_width + head * width;
            start..start + width
        };
        let blocks = rows.div_ceil(BLOCK);
        team.for_chunks(
            heads * blocks,
            heads * blocks / (4 * team.size()),
            |range| {
                for at in range {
                    let (head, first) = (at / blocks, at % blocks * BLOCK);
                    let own = first..rows.min(first + BLOCK);
                    for row in own.clone() {
                        let to = (head * rows + row) * inputs;
                        // SAFETY: nobody writes `x`, and each block is one thread's.
                        unsafe {
                            let to = scratch.rows.get_mut(to..to + inputs);
                            to.copy_from_slice(&x.get(columns(row, head))[..inputs]);
                        }
                    }
                    if self.heads[head].is_quantized() {
                        let values =
                            (head * rows + own.start) * inputs..(head * rows + own.end) * inputs;
                        // SAFETY: the rows are written, and each block is one thread's.
                        unsafe {
                            let records = self.records(scratch, head, rows);
                            records.set_rows(isa, own, scratch.rows.get(values));
                        }
                    }
                }
            },
        );
        // SAFETY: the rows are written, and the outputs are only written here.
        unsafe { self.multiply(team, rows, scratch) };
        let out_width = heads * (outputs + passed);
        team.for_chunks(rows, (rows / (4 * team.size())).min(16), |range| {
            for row in range {
                // SAFETY: nobody writes the outputs and `x`, and each row is one thread's.
                unsafe {
                    let to = out.get_mut(row * out_width..(row + 1) * out_width);
                    for (head, to) in to.chunks_exact_mut(outputs + passed).enumerate() {
                        let from = (head * rows + row) * outputs;
                        to[..outputs].copy_from_slice(scratch.outputs.get(from..from + outputs));
                        let given = &x.get(columns(row, head))[inputs..inputs + passed];
                        to[outputs..].copy_from_slice(given);
                    }
                }
            }
        });
    }

    /// # Safety
    /// The heads' rows are written, and nobody else touches the outputs.
    unsafe fn multiply(&self, team: &Team, rows: usize, scratch: &HeadsScratch) {
        let (heads, inputs, outputs) = (self.heads.len(), self.inputs, self.outputs);
        let tiles = Linear::tiles_of(outputs);
        let parts = rows.div_ceil(ROWS);
        // The same amount for each unit, whatever the number of rows.
        let step = (heads * tiles * parts).div_ceil(UNITS * team.size());
        let step = step.next_multiple_of(TILES).min(tiles);
        let strips = tiles.div_ceil(step);
        let range_of = |at: usize, step: usize, end: usize| -> Range<usize> {
            at * step..end.min((at + 1) * step)
        };
        team.for_chunks(heads * strips * parts, 1, |range| {
            for at in range {
                let (head, at) = (at / (strips * parts), at % (strips * parts));
                let (strip, part) = (at % strips, at / strips);
                let y = scratch
                    .outputs
                    .part(head * rows * outputs..(head + 1) * rows * outputs);
                let linear = &self.heads[head];
                let input = if linear.is_quantized() {
                    Input::Integers(self.records(scratch, head, rows))
                } else {
                    let own = head * rows * inputs..(head + 1) * rows * inputs;
                    Input::Floats(scratch.rows.part(own))
                };
                let (tiles, rows) = (range_of(strip, step, tiles), range_of(part, ROWS, rows));
                // SAFETY: the caller's promise; units are disjoint.
                unsafe { linear.forward_part(input, y, tiles, rows) };
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::linear::{FloatType, Format, Stored};

    const HEADS: usize = 3;
    const INPUTS: usize = 40;
    const OUTPUTS: usize = 56;
    const PASSED: usize = 8;

    fn waves(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin()).collect()
    }

    fn weight(isa: Isa, format: Format) -> HeadsWeight {
        let values = waves(HEADS * OUTPUTS * INPUTS, 0.37);
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let matrices: Vec<_> = bytes
            .chunks_exact(4 * OUTPUTS * INPUTS)
            .map(|bytes| Matrix {
                stored: Stored::Floats(FloatType::F32, format),
                rows: OUTPUTS,
                columns: INPUTS,
                bytes,
                bias: None,
            })
            .collect();
        HeadsWeight::pack(isa, &Pool::new(2), &matrices).unwrap()
    }

    fn forward(
        threads: usize,
        isa: Isa,
        weight: &HeadsWeight,
        x: &[f32],
        width: usize,
    ) -> Vec<f32> {
        let rows = x.len() / (HEADS * width);
        let mut memory = HeadsMemory::default();
        memory.reserve(weight, rows);
        let scratch = memory.share();
        let passed = if width > INPUTS + PASSED { 0 } else { PASSED };
        let mut out = vec![f32::NAN; rows * HEADS * (OUTPUTS + passed)];
        let (to, x) = (SharedSlice::new(&mut out), SharedSlice::read_only(x));
        // SAFETY: nobody else has the buffers.
        Pool::new(threads).run(&|team| unsafe {
            weight.forward(team, isa, (x, rows, width), passed, &scratch, to);
        });
        out
    }

    #[test]
    fn each_head_passes_its_own_matrix_and_the_rest_passes_by() {
        let mut row = vec![0.0; INPUTS];
        for isa in Isa::available() {
            for (format, limit) in [(Format::F32, 1e-5), (Format::Int8, 0.02)] {
                let weight = weight(isa, format);
                for (rows, width) in [
                    (1, INPUTS + PASSED),
                    (9, INPUTS + PASSED),
                    (70, INPUTS + 30),
                ] {
                    let x = waves(rows * HEADS * width, 0.11);
                    let passed = if width > INPUTS + PASSED { 0 } else { PASSED };
                    let found = forward(2, isa, &weight, &x, width);
                    let each = found.chunks(OUTPUTS + passed).zip(x.chunks(width));
                    for (at, (found, x)) in each.enumerate() {
                        assert_eq!(found[OUTPUTS..], x[INPUTS..INPUTS + passed]);
                        for (i, y) in found[..OUTPUTS].iter().enumerate() {
                            weight.heads[at % HEADS].dequantize_row(i, &mut row);
                            let exact: f64 = row
                                .iter()
                                .zip(x)
                                .map(|(&w, &x)| f64::from(w) * f64::from(x))
                                .sum();
                            assert!(
                                (f64::from(*y) - exact).abs() < limit * 10.0,
                                "{y} for {exact}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_in_any_batch() {
        let isa = Isa::detect();
        let width = INPUTS + PASSED;
        for format in [Format::F32, Format::Int8, Format::Bf16] {
            let weight = weight(isa, format);
            let x = waves(70 * HEADS * width, 0.07);
            let together = forward(3, isa, &weight, &x, width);
            for row in [0, 5, 69] {
                let alone = forward(
                    1,
                    isa,
                    &weight,
                    &x[row * HEADS * width..][..HEADS * width],
                    width,
                );
                let own =
                    &together[row * HEADS * (OUTPUTS + PASSED)..][..HEADS * (OUTPUTS + PASSED)];
                assert_eq!(alone, own);
            }
        }
    }

    #[test]
    fn matrices_of_different_shapes_are_refused() {
        let bytes = vec![0; 4 * 64];
        let matrix = |rows, columns| Matrix {
            stored: Stored::Floats(FloatType::F32, Format::F32),
            rows,
            columns,
            bytes: &bytes,
            bias: None,
        };
        let pack = |matrices: &[Matrix]| {
            HeadsWeight::pack(Isa::detect(), &Pool::new(1), matrices).map(|_| ())
        };
        assert!(pack(&[matrix(4, 16), matrix(4, 16)]).is_ok());
        assert!(pack(&[matrix(4, 16), matrix(16, 4)]).is_err());
        assert!(pack(&[]).is_err());
    }
}
