//! Groups of activations as kernels read them, and how they are written; see [`QuantizedRows`](super::QuantizedRows).

#![allow(
    clippy::cast_ptr_alignment,
    reason = "records begin at multiples of 4 bytes"
)]

use crate::cpu::quant::GROUP;

/// Bytes of a record for each row.
pub(super) const RECORD: usize = GROUP + 20;

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
