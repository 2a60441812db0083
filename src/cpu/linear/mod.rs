//! Linear layers, `y = x * W^T + bias`, on packed weights: integers with integer dot products, or floats as they are.
//!
//! What every thread of a team calls in lockstep, inside [`Pool::run`](crate::cpu::Pool::run):
//!
//! ```text
//! linear.forward(team, x: SharedSlice<f32> [rows, in], rows, y: SharedSlice<f32> [rows, out], scratch: SharedSlice<u8>)
//!     // scratch: linear.scratch_bytes(rows), at a cache line; unused for float weights
//! ```
//!
//! or, where several layers read the same rows, or the operation before can write them itself:
//!
//! ```text
//! let rows = QuantizedRows::new(scratch, rows, in);    // QuantizedRows::bytes(rows, in)
//! rows.quantize(team, x);                               // or rows.set_rows(some, &values) by any thread, then a barrier
//! linear.forward_quantized(team, &rows, y);             // if linear.is_quantized()
//! ```
//!
//! Each ends with a barrier. A row's result has the same bits whatever other rows are computed with it.

mod activations;
mod floats;
mod integers;
mod kernels;
mod pack;
mod packed;
mod quantize;
mod record;

pub use activations::QuantizedRows;
pub use pack::{FloatType, Matrix, Stored};
pub(in crate::cpu) use packed::PackedShape;

use crate::cpu::half::{f32_to_bf16, f32_to_f16};
use crate::cpu::isa::Isa;
use crate::cpu::memory::{Aligned, SharedSlice};
use crate::cpu::pool::Team;
use crate::cpu::quant::{Code, GROUP};
use floats::FloatWeights;
use integers::IntWeights;
use pack::Kept;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Number of outputs that are packed side by side.
const TILE: usize = 16;
/// Maximum number of rows that a kernel computes at once.
const BLOCK: usize = 4;

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// 32-bit floats; exact.
    F32,
    /// Half precision, computed in f32.
    F16,
    /// bfloat16, computed in f32.
    Bf16,
    /// 8-bit integers in groups of 32 with half-precision scales.
    Int8,
    /// 4-bit integers in groups of 32 with half-precision scales and minima.
    Int4,
}

impl Format {
    /// The integers that stand for the weights, if the format has integers.
    const fn code(self) -> Option<Code> {
        let (bits, min) = match self {
            Self::Int8 => (8, false),
            Self::Int4 => (4, true),
            Self::F32 | Self::F16 | Self::Bf16 => return None,
        };
        Some(Code {
            bits,
            group: GROUP,
            nested: false,
            min,
            table: None,
        })
    }
}

#[derive(Clone)]
enum Weights {
    Int(IntWeights),
    Float(FloatWeights),
}

/// The rows that a layer reads: quantized integers, or contiguous floats.
#[derive(Clone, Copy)]
pub(in crate::cpu) enum Input<'a> {
    Integers(QuantizedRows<'a>),
    Floats(SharedSlice<'a, f32>),
}

/// A linear layer: weights of shape `[out, in]`, packed for one instruction set, and an optional bias.
#[derive(Clone)]
pub struct Linear {
    isa: Isa,
    out_features: usize,
    in_features: usize,
    weights: Weights,
    /// Padded to whole tiles.
    bias: Option<Aligned<f32>>,
}

impl Linear {
    /// Number of values of a row of the result.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Number of values of a row of the input.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Bytes of the packed weights, and of the bias.
    pub fn bytes(&self) -> usize {
        let weights = match &self.weights {
            Weights::Int(weights) => weights.bytes(),
            Weights::Float(weights) => weights.bytes(),
        };
        let bias = self.bias.as_ref().map_or(0, |_| self.out_features);
        weights + bias * size_of::<f32>()
    }

    /// Whether it multiplies integers, and so takes [`QuantizedRows`].
    pub fn is_quantized(&self) -> bool {
        matches!(self.weights, Weights::Int(_))
    }

    /// Bytes of scratch memory that `forward` needs.
    pub fn scratch_bytes(&self, rows: usize) -> usize {
        match &self.weights {
            Weights::Int(_) => QuantizedRows::bytes(rows, self.in_features),
            Weights::Float(_) => 0,
        }
    }

    /// The weights of one output as floats: the row of an embedding whose table this is.
    ///
    /// # Panics
    /// If there is no such output, or `out` does not have `in_features` elements.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.out_features,
            "the weight has {} rows, but row {row} was asked for",
            self.out_features
        );
        assert_eq!(out.len(), self.in_features);
        match &self.weights {
            Weights::Int(weights) => weights.dequantize_row(row, out),
            Weights::Float(weights) => weights.row(row, out),
        }
    }

    /// Writes `x [rows, in]` times the transposed weights, plus the bias, to `y [rows, out]`. Every thread of the team calls it
    /// with the same arguments; it ends with a barrier.
    ///
    /// # Safety
    /// Until it returns on all threads, nobody may write `x`, and nobody else touch `y` or `scratch`, which begins at a cache
    /// line.
    ///
    /// # Panics
    /// If a buffer is too small.
    pub unsafe fn forward(
        &self,
        team: &Team,
        x: SharedSlice<f32>,
        rows: usize,
        y: SharedSlice<f32>,
        scratch: SharedSlice<u8>,
    ) {
        match &self.weights {
            Weights::Int(_) => {
                let quantized = QuantizedRows::new(scratch, rows, self.in_features);
                // SAFETY: the caller's promise about `x` and `scratch`.
                unsafe { quantized.quantize(self.isa, team, x) };
                // SAFETY: the rows are written, by all threads, and the caller's promise about `y`.
                unsafe { self.forward_quantized(team, &quantized, y) };
            }
            Weights::Float(weights) => {
                assert!(x.len() >= rows * self.in_features);
                assert!(y.len() >= rows * self.out_features);
                let task = floats::Task {
                    weights,
                    x: x.as_ptr(),
                    rows,
                    cols: self.in_features,
                    output: self.output(y),
                };
                // SAFETY: the buffers are large enough, and the caller's promise about them.
                unsafe { kernels::floats(self.isa, team, &task) };
            }
        }
    }

    /// The same on rows that are quantized already, and so may be read by several layers. Every thread of the team calls it
    /// with the same arguments; it ends with a barrier.
    ///
    /// # Safety
    /// All rows of `x` must have been written before the last barrier. Until it returns on all threads, nobody may write `x`,
    /// and nobody else touch `y`.
    ///
    /// # Panics
    /// If the weights are floats, the rows have another length than `in_features`, or `y` is too small.
    pub unsafe fn forward_quantized(&self, team: &Team, x: &QuantizedRows, y: SharedSlice<f32>) {
        let Weights::Int(weights) = &self.weights else {
            panic!("float weights take no quantized rows");
        };
        assert_eq!(x.cols(), self.in_features);
        assert!(y.len() >= x.rows() * self.out_features);
        let task = integers::Task {
            weights,
            x: *x,
            output: self.output(y),
        };
        // SAFETY: the buffers are large enough, and the caller's promise about them.
        unsafe { kernels::integers(self.isa, team, &task) };
    }

    /// Number of tiles of a layer with this number of outputs.
    pub(in crate::cpu) const fn tiles_of(out_features: usize) -> usize {
        out_features.div_ceil(TILE)
    }

    /// Computes the outputs of some tiles for some rows of `x`, which begin at a block of quantized rows, on the calling thread
    /// alone, and writes them to `y` `[all rows, out]`.
    ///
    /// # Safety
    /// All rows of `x` must have been written before the last barrier, and until the next nobody may write them, nor touch these
    /// outputs of these rows.
    ///
    /// # Panics
    /// If the weights do not read what `x` is, or a buffer is too small, or there are no such tiles or rows.
    pub(in crate::cpu) unsafe fn forward_part(
        &self,
        x: Input,
        y: SharedSlice<f32>,
        tiles: Range<usize>,
        rows: Range<usize>,
    ) {
        assert!(tiles.end <= Self::tiles_of(self.out_features));
        assert!(y.len() >= rows.end * self.out_features);
        let output = self.output(y);
        match (&self.weights, x) {
            (Weights::Int(weights), Input::Integers(x)) => {
                assert!(x.cols() == self.in_features && rows.end <= x.rows());
                let task = integers::Task { weights, x, output };
                // SAFETY: the buffers are large enough, and the caller's promise about them.
                unsafe { kernels::integers_part(self.isa, &task, tiles, rows) };
            }
            (Weights::Float(weights), Input::Floats(x)) => {
                assert!(x.len() >= rows.end * self.in_features);
                let task = floats::Task {
                    weights,
                    x: x.as_ptr(),
                    rows: rows.end,
                    cols: self.in_features,
                    output,
                };
                // SAFETY: as above.
                unsafe { kernels::floats_part(self.isa, &task, tiles, rows) };
            }
            _ => panic!("the rows are not what the weights read"),
        }
    }

    fn output(&self, y: SharedSlice<f32>) -> Output {
        Output {
            y: y.as_ptr(),
            stride: self.out_features,
            bias: self
                .bias
                .as_ref()
                .map_or(std::ptr::null(), |bias| bias.as_ptr()),
        }
    }
}

/// Bytes that a packed matrix `[rows, cols]` takes.
pub fn packed_bytes(stored: Stored, rows: usize, cols: usize) -> usize {
    let tiles = rows.div_ceil(TILE);
    match stored.kept() {
        Kept::Integers(code) => tiles * integers::tile_bytes(code, cols.div_ceil(GROUP)),
        Kept::Floats(Format::F32) => tiles * TILE * cols * 4,
        Kept::Floats(_) => tiles * TILE * cols * 2,
    }
}

/// The destination of results: rows of `stride` values. The bias of whole tiles is added unless it is null.
#[derive(Clone, Copy)]
struct Output {
    y: *mut f32,
    stride: usize,
    bias: *const f32,
}

// SAFETY: threads write disjoint tiles of it.
unsafe impl Sync for Output {}

fn to_half(format: Format, value: f32) -> u16 {
    match format {
        Format::Bf16 => f32_to_bf16(value),
        _ => f32_to_f16(value),
    }
}

#[cfg(test)]
pub(super) mod tests;
