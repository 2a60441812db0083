//! Quantized weights: blocks of GGUF files taken apart exactly and made of floats, and floats rounded to groups of integers.

mod bits;
mod encode;
mod gguf;
mod gguf_small;
mod round;
mod table;

use serde::{Deserialize, Serialize};

pub use encode::encode_all;
pub use gguf::BlockType;
pub use round::{round_int4, round_int8};
pub use table::Table;

/// Weights along the inputs that share a scale, and the size of the groups that activations are quantized in.
pub const GROUP: usize = 32;

/// Weights along the inputs whose scales share factors where scales are [nested](Code::nested).
pub const SUPER: usize = 256;

/// How integers stand for weights: `scale * (q - zero)`, or `scale * q + min` where groups have a minimum of their own, or `scale`
/// times the integer of a table that `q` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Code {
    /// Bits of an integer: 2, 4, 6 or 8.
    pub bits: usize,
    /// Weights that share a scale: 16 or 32.
    pub group: usize,
    /// Whether scales and minima are 8-bit integers times half-precision factors, which 256 weights share; they are half precision
    /// by themselves otherwise.
    pub nested: bool,
    /// Whether groups have minima.
    pub min: bool,
    /// What the integers are indices into, if anything.
    pub table: Option<Table>,
}

impl Code {
    /// The integer that stands for 0 where there are neither minima nor a table: the middle of the range.
    pub const fn zero(self) -> u8 {
        if self.min { 0 } else { 1 << (self.bits - 1) }
    }

    /// What an integer is, before it is scaled.
    pub const fn value(self, q: u8) -> i32 {
        match self.table {
            Some(table) => table.values()[(q & 0x0f) as usize] as i32,
            None => q as i32 - self.zero() as i32,
        }
    }

    /// Whether it is that of a block type or of rounded floats, and so one that there are kernels for.
    pub(in crate::cpu) const fn is_known(self) -> bool {
        matches!(
            (
                self.bits,
                self.group,
                self.nested,
                self.min,
                self.table.is_some()
            ),
            (4 | 6, 32, false | true, true, false)
                | (4 | 6 | 8, 32, false, false, false)
                | (6, 16, true, false, false)
                | (2, 16, true, true, false)
                | (4, 16 | 32, false | true, false, true)
        )
    }
}

/// One row of weights as integers: `q` has one for each weight, `scales` and `mins` (empty without minima) one for each group.
/// Nested ones are integers, and `factors` (empty otherwise) has what they are multiplied with.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct IntRow {
    /// Integers, below 4, 16 or 64 where they have 2, 4 or 6 bits.
    pub q: Vec<u8>,
    /// Scales of the groups.
    pub scales: Vec<f32>,
    /// Minima of the groups.
    pub mins: Vec<f32>,
    /// Of each 256 weights, the factor of their scales and that of their minima.
    pub factors: Vec<[f32; 2]>,
}

impl IntRow {
    fn clear(&mut self) {
        self.q.clear();
        self.scales.clear();
        self.mins.clear();
        self.factors.clear();
    }

    /// What the integers stand for.
    pub fn dequantize(&self, code: Code) -> Vec<f32> {
        let values = self.q.iter().enumerate().map(|(i, &q)| {
            let [scale, min] = self.factors.get(i / SUPER).copied().unwrap_or([1.0; 2]);
            let value = self.scales[i / code.group] * scale * code.value(q) as f32;
            value + self.mins.get(i / code.group).map_or(0.0, |m| m * min)
        });
        values.collect()
    }
}

/// The integer nearest to a small number, without the call that `round` is on a plain x86-64.
#[allow(
    clippy::inline_always,
    reason = "what is not inlined is compiled without the instructions it is made for"
)]
#[inline(always)]
fn rounded(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    x + ROUND - ROUND
}

/// Sums of twelve uniform numbers, which are nearly normal, as weights are.
#[cfg(test)]
fn near_normal(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    (0..len)
        .map(|_| 0.02 * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0))
        .collect()
}
