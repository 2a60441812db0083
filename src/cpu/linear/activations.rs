//! Rows of activations as 8-bit integers, in the order in which kernels read them.
//!
//! A group of 32 activations is rounded to `scale * (q + zero)`: the 256 steps span what lies between its least and its largest
//! activation (and 0), for often one of them is far larger than the others, on one side.

#![allow(
    clippy::cast_ptr_alignment,
    reason = "records begin at multiples of 4 bytes"
)]

use crate::cpu::isa::Isa;
use crate::cpu::memory::SharedSlice;
use crate::cpu::pool::Team;
use crate::cpu::quant::GROUP;

use super::{BLOCK, kernels};
use std::ops::Range;

/// Groups of each row that a thread quantizes before it takes more.
const CHUNK: usize = 16;

/// Rows as integers, in groups of 32 with a scale each, in a buffer of the caller.
///
/// Rows are in blocks of four (one, if there is only one row), so that a kernel finds the same inputs of all rows of a block
/// side by side. A block has a record for each group, and that for each of its R rows:
/// 8 times 4 integers q `[8][R][4]`, the scale (f32), the scale times the sum of all q + zero (f32), -8 times that sum (i32),
/// -128 times the sum of the first 16 (i32), and the zero (i16, then 16 zero bits).
#[derive(Clone, Copy)]
pub struct QuantizedRows<'a> {
    data: SharedSlice<'a, u8>,
    rows: usize,
    cols: usize,
}

/// Bytes of a record for each row.
pub(super) const RECORD: usize = GROUP + 20;

impl<'a> QuantizedRows<'a> {
    /// Bytes for `rows` rows of `cols` values.
    pub const fn bytes(rows: usize, cols: usize) -> usize {
        rows.next_multiple_of(block(rows)) * cols.div_ceil(GROUP) * RECORD
    }

    /// A place for `rows` rows of `cols` values in `data`, which must begin at a cache line.
    ///
    /// # Panics
    /// If `data` is too small or not aligned.
    pub fn new(data: SharedSlice<'a, u8>, rows: usize, cols: usize) -> Self {
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
    #[inline]
    pub(in crate::cpu) const fn block(&self) -> usize {
        block(self.rows)
    }

    /// Where the block of rows that `row` begins lies.
    #[inline]
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
    pub unsafe fn quantize(&self, isa: Isa, team: &Team, x: SharedSlice<f32>) {
        let groups = self.cols.div_ceil(GROUP);
        assert!(x.len() >= self.rows * self.cols);
        // A record is written by one thread: threads that write to the same cache lines wait for each other.
        let parts = groups.div_ceil(CHUNK);
        let units = self.rows.div_ceil(self.block()) * parts;
        team.for_chunks(units, 1, |range| {
            for at in range {
                let (row, first) = (at / parts * self.block(), at % parts * CHUNK);
                let end = self.cols.min((first + CHUNK) * GROUP);
                let rows = row..self.rows.min(row + self.block());
                let values = row * self.cols + first * GROUP..(rows.end - 1) * self.cols + end;
                // SAFETY: the caller's promise; each group is written by one thread.
                unsafe { self.set_groups(isa, rows, first, x.get(values)) };
            }
        });
    }

    /// Quantizes `values [rows, cols]` as these rows.
    ///
    /// # Safety
    /// Nobody else may touch the rows meanwhile.
    ///
    /// # Panics
    /// If there are no such rows, or the values are not theirs.
    pub unsafe fn set_rows(&self, isa: Isa, rows: Range<usize>, values: &[f32]) {
        assert!(rows.end <= self.rows && values.len() == rows.len() * self.cols);
        let mut row = rows.start;
        while row < rows.end {
            let end = rows.end.min((row + 1).next_multiple_of(self.block()));
            let part = (row - rows.start) * self.cols..(end - rows.start) * self.cols;
            // SAFETY: the caller's promise.
            unsafe { self.set_groups(isa, row..end, 0, &values[part]) };
            row = end;
        }
    }

    /// Quantizes groups of rows of one block, from group `first` on: `values` begins with those of the first row, and ends with
    /// those of the last.
    unsafe fn set_groups(&self, isa: Isa, rows: Range<usize>, first: usize, values: &[f32]) {
        let block = self.block();
        let target = Target {
            // SAFETY: the record lies within the buffer.
            record: unsafe {
                let records = self.block_at(rows.start - rows.start % block).cast_mut();
                records.add(first * RECORD * block)
            },
            block,
            row: rows.start % block,
        };
        // SAFETY: the records lie within the buffer, and belong to the caller.
        unsafe { kernels::quantize(isa, values, rows.len(), self.cols, target) };
    }
}

/// Where the groups of a row go: the record of the first, rows in a block, and which of them it is.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) record: *mut u8,
    pub(super) block: usize,
    pub(super) row: usize,
}

impl Target {
    /// Makes every product with the row no number: integers cannot say that an activation was none.
    ///
    /// # Safety
    /// There must be such a record, which nobody else touches.
    pub(super) unsafe fn spoil(self) {
        // SAFETY: both lie within the record.
        unsafe {
            let tail = self.record.add(GROUP * self.block).cast::<f32>();
            tail.add(self.row).write(f32::NAN);
            tail.add(self.block + self.row).write(f32::NAN);
        }
    }

    /// Writes the integers, their range, and their sum and that of the first 16, and goes on to the next group.
    ///
    /// # Safety
    /// There must be such a record, which nobody else touches.
    #[inline]
    pub(super) unsafe fn push(&mut self, q: &[i8; GROUP], at: Span, sum: i32, first_sum: i32) {
        let (block, row) = (self.block, self.row);
        let sum = sum + GROUP as i32 * at.zero;
        let first_sum = first_sum + GROUP as i32 / 2 * at.zero;
        // SAFETY: all lie within the record.
        unsafe {
            for (step, q) in q.as_chunks::<4>().0.iter().enumerate() {
                let to = self.record.add((step * block + row) * 4);
                to.cast::<[i8; 4]>().write(*q);
            }
            let tail = self.record.add(GROUP * block).cast::<f32>();
            tail.add(row).write(at.scale);
            tail.add(block + row).write(at.scale * sum as f32);
            let tail = tail.cast::<i32>();
            tail.add(2 * block + row).write(-8 * sum);
            tail.add(3 * block + row).write(-128 * first_sum);
            tail.add(4 * block + row).write(at.zero & 0xffff);
            self.record = self.record.add(RECORD * block);
        }
    }
}

/// How a group is rounded: `q = x * inverse - zero`, each term to an integer.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) scale: f32,
    pub(super) inverse: f32,
    /// Within -127 and 127.
    pub(super) zero: i32,
}

impl Span {
    /// From the largest activation of a group and the negative of the least.
    #[inline(always)]
    #[allow(
        clippy::inline_always,
        reason = "rounding is one instruction where it is inlined"
    )]
    pub(super) fn new(largest: f32, minus_least: f32) -> Self {
        let (high, low) = (largest.max(0.0), minus_least.max(0.0));
        let scale = (high + low) / 254.0;
        if scale < f32::MIN_POSITIVE {
            return Self {
                scale: 0.0,
                inverse: 0.0,
                zero: 0,
            };
        }
        let inverse = 1.0 / scale;
        Self {
            scale,
            inverse,
            zero: ((high - low) * 0.5 * inverse).round_ties_even() as i32,
        }
    }
}

const fn block(rows: usize) -> usize {
    if rows == 1 { 1 } else { BLOCK }
}
