//! Rounding rows of activations to integers.

use std::ops::Range;

use super::activations::QuantizedRows;
use super::kernels;
use super::record::{RECORD, Target};
use crate::cpu::isa::Isa;
use crate::cpu::memory::SharedSlice;
use crate::cpu::pool::Team;
use crate::cpu::quant::GROUP;

/// Groups of each row that a thread quantizes before it takes more.
const CHUNK: usize = 16;

impl QuantizedRows<'_> {
    /// Quantizes `x [rows, cols]`. Every thread of the team calls it; it ends with a barrier.
    ///
    /// # Safety
    /// Until it returns on all threads, nobody may write `x`, and nobody else touch these rows.
    ///
    /// # Panics
    /// If `x` is too small.
    pub unsafe fn quantize(&self, isa: Isa, team: &Team, x: SharedSlice<f32>) {
        let groups = self.cols().div_ceil(GROUP);
        assert!(x.len() >= self.rows() * self.cols());
        // A record is written by one thread: threads that write to the same cache lines wait for each other.
        let parts = groups.div_ceil(CHUNK);
        let units = self.rows().div_ceil(self.block()) * parts;
        team.for_chunks(units, 1, |range| {
            for at in range {
                let (row, first) = (at / parts * self.block(), at % parts * CHUNK);
                let end = self.cols().min((first + CHUNK) * GROUP);
                let rows = row..self.rows().min(row + self.block());
                let values = row * self.cols() + first * GROUP..(rows.end - 1) * self.cols() + end;
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
        assert!(rows.end <= self.rows() && values.len() == rows.len() * self.cols());
        let mut row = rows.start;
        while row < rows.end {
            let end = rows.end.min((row + 1).next_multiple_of(self.block()));
            let part = (row - rows.start) * self.cols()..(end - rows.start) * self.cols();
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
        unsafe { kernels::quantize(isa, values, rows.len(), self.cols(), target) };
    }
}
