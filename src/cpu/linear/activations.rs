//! Rows of activations as 8-bit integers, in the order in which kernels read them.
//!
//! A group of 32 activations is rounded to `scale * (q + zero)`: the 256 steps span what lies between its least and its largest
//! activation (and 0), for often one of them is far larger than the others, on one side.

use crate::cpu::memory::SharedSlice;
use crate::cpu::quant::GROUP;

use super::BLOCK;
use super::record::RECORD;

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
}

const fn block(rows: usize) -> usize {
    if rows == 1 { 1 } else { BLOCK }
}
