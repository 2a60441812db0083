//! Rows of activations as 8-bit integers, in the order in which kernels read them.

#![allow(
    clippy::cast_ptr_alignment,
    reason = "records begin at multiples of 16 bytes"
)]

use crate::cpu::isa::Isa;
use crate::cpu::memory::Shared;
use crate::cpu::pool::Team;
use crate::cpu::quant::GROUP;

use super::BLOCK;

/// Groups that a thread quantizes before it takes more.
const CHUNK: usize = 64;

/// Rows as integers, in groups of 32 with a scale each, in a buffer of the caller.
///
/// Rows are in blocks of four (one, if there is only one row), so that a kernel finds the same inputs of all rows of a block
/// side by side. A block has a record for each group, and that for each of its R rows:
/// 8 times 4 integers `[8][R][4]`, the scale (f32), the scale times the sum of the integers (f32), -8 times that sum (i32), and
/// -128 times the sum of the first 16 integers (i32).
#[derive(Clone, Copy)]
pub struct QuantizedRows<'a> {
    data: Shared<'a, u8>,
    rows: usize,
    cols: usize,
}

/// Bytes of a record for each row.
pub(super) const RECORD: usize = GROUP + 16;

impl<'a> QuantizedRows<'a> {
    /// Bytes for `rows` rows of `cols` values.
    pub const fn bytes(rows: usize, cols: usize) -> usize {
        rows.next_multiple_of(block(rows)) * cols.div_ceil(GROUP) * RECORD
    }

    /// A place for `rows` rows of `cols` values in `data`, which must begin at a cache line.
    ///
    /// # Panics
    /// If `data` is too small or not aligned.
    pub fn new(data: Shared<'a, u8>, rows: usize, cols: usize) -> Self {
        assert!(
            data.len() >= Self::bytes(rows, cols),
            "{rows} rows of {cols} take {} bytes, but the buffer has {}",
            Self::bytes(rows, cols),
            data.len()
        );
        assert!(data.as_ptr().addr().is_multiple_of(64));
        Self { data, rows, cols }
    }

    /// How many rows there are.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Rows in a block.
    pub(super) const fn block(&self) -> usize {
        block(self.rows)
    }

    /// Where the block of rows that `row` begins lies.
    pub(super) fn block_at(&self, row: usize) -> *const u8 {
        let stride = self.cols.div_ceil(GROUP) * RECORD;
        debug_assert!(row.is_multiple_of(self.block()) && row < self.rows);
        // SAFETY: the block lies within the buffer.
        unsafe { self.data.as_ptr().add(row * stride) }
    }

    /// Quantizes `x [rows, cols]`. Every thread of the team calls it; it ends with a barrier.
    ///
    /// # Safety
    /// Until it returns on all threads, nobody may write `x`, and nobody else touch these rows.
    ///
    /// # Panics
    /// If `x` is too small.
    pub unsafe fn quantize(&self, isa: Isa, team: &Team, x: Shared<f32>) {
        let groups = self.cols.div_ceil(GROUP);
        assert!(x.len() >= self.rows * self.cols);
        team.for_chunks(self.rows * groups, CHUNK, |range| {
            for at in range {
                let (row, group) = (at / groups, at % groups);
                let end = self.cols.min((group + 1) * GROUP);
                let range = row * self.cols + group * GROUP..row * self.cols + end;
                // SAFETY: the caller's promise; each group is written by one thread.
                unsafe { self.set_group(isa, row, group, x.get(range)) };
            }
        });
    }

    /// Quantizes `values` as row `row`.
    ///
    /// # Safety
    /// Nobody else may touch the row meanwhile.
    ///
    /// # Panics
    /// If there is no such row, or `values` are not `cols`.
    pub unsafe fn set_row(&self, isa: Isa, row: usize, values: &[f32]) {
        assert!(row < self.rows && values.len() == self.cols);
        for (group, values) in values.chunks(GROUP).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { self.set_group(isa, row, group, values) };
        }
    }

    unsafe fn set_group(&self, _isa: Isa, row: usize, group: usize, values: &[f32]) {
        let block = self.block();
        let (first, r) = (row - row % block, row % block);
        let mut full = [0.0; GROUP];
        full[..values.len()].copy_from_slice(values);
        let quantized = Group::new(&full);
        // SAFETY: the record lies within the buffer, and belongs to the caller.
        unsafe {
            let record = self.block_at(first).cast_mut().add(group * RECORD * block);
            for (step, q) in quantized.q.as_chunks::<4>().0.iter().enumerate() {
                record
                    .add((step * block + r) * 4)
                    .cast::<[i8; 4]>()
                    .write(*q);
            }
            let tail = record.add(GROUP * block).cast::<f32>();
            tail.add(r).write(quantized.scale);
            tail.add(block + r)
                .write(quantized.scale * quantized.sum() as f32);
            let tail = tail.cast::<i32>();
            tail.add(2 * block + r).write(-8 * quantized.sum());
            tail.add(3 * block + r).write(-128 * quantized.first_sum());
        }
    }
}

const fn block(rows: usize) -> usize {
    if rows == 1 { 1 } else { BLOCK }
}

/// 32 values as integers of at most 127 times a scale.
struct Group {
    q: [i8; GROUP],
    scale: f32,
}

impl Group {
    fn new(values: &[f32; GROUP]) -> Self {
        let largest = values.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        let scale = largest / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        Self {
            q: values.map(|x| (x * inverse).round_ties_even() as i8),
            scale,
        }
    }

    fn sum(&self) -> i32 {
        self.q.iter().map(|&q| i32::from(q)).sum()
    }

    fn first_sum(&self) -> i32 {
        self.q[..GROUP / 2].iter().map(|&q| i32::from(q)).sum()
    }
}
