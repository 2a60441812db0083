//! Linear layers, `y = x * W^T + bias`, on packed weights: integers with integer dot products, or floats as they are.
//!
//! What every thread of a team calls in lockstep, inside [`Pool::run`](crate::cpu::Pool::run):
//!
//! ```text
//! linear.forward(team, x: Shared<f32> [rows, in], rows, y: Shared<f32> [rows, out], scratch: Shared<u8>)
//!     // scratch: linear.scratch_bytes(rows), at a cache line; unused for float weights
//! ```
//!
//! or, where several layers read the same rows, or the operation before can write them itself:
//!
//! ```text
//! let rows = QuantizedRows::new(scratch, rows, in);    // QuantizedRows::bytes(rows, in)
//! rows.quantize(team, x);                               // or rows.set_row(row, &values) by any thread, then a barrier
//! linear.forward_quantized(team, &rows, y);             // if linear.is_quantized()
//! ```
//!
//! Each ends with a barrier. A row's result has the same bits whatever other rows are computed with it.

mod activations;
mod floats;
mod integers;
mod kernels;

pub use activations::QuantizedRows;

use crate::cpu::half::{f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::cpu::isa::Isa;
use crate::cpu::memory::{Aligned, Shared};
use crate::cpu::pool::Team;
use crate::cpu::quant::{BlockType, Code, GROUP, IntRow, round_int4, round_int8};
use crate::error::{Error, Result};
use floats::FloatWeights;
use integers::IntWeights;

/// Outputs that are packed side by side.
const TILE: usize = 16;
/// Rows that a kernel computes at once at most.
const BLOCK: usize = 4;

/// How weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// How integers stand for weights, where they do.
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
        })
    }
}

/// Float weights, row after row of inputs.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// Half precision, as bits.
    F16(&'a [u16]),
    /// bfloat16, as bits.
    Bf16(&'a [u16]),
}

impl Source<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(bits) | Self::Bf16(bits) => bits.len(),
        }
    }

    fn row(&self, row: usize, cols: usize) -> Vec<f32> {
        let range = row * cols..(row + 1) * cols;
        match self {
            Self::F32(values) => values[range].to_vec(),
            Self::F16(bits) => bits[range].iter().map(|&b| f16_to_f32(b)).collect(),
            Self::Bf16(bits) => bits[range]
                .iter()
                .map(|&b| f32::from_bits(u32::from(b) << 16))
                .collect(),
        }
    }
}

#[derive(Clone)]
enum Weights {
    Int(IntWeights),
    Float(FloatWeights),
}

/// A linear layer: weights of shape `[out, in]`, packed for one instruction set, and an optional bias.
#[derive(Clone)]
pub struct Linear {
    isa: Isa,
    out_features: usize,
    in_features: usize,
    weights: Weights,
    /// Filled up to whole tiles.
    bias: Option<Aligned<f32>>,
}

impl Linear {
    /// Packs float weights `[out, in]` in `format`, rounding where it is narrower.
    ///
    /// # Errors
    /// `invalid_value` if there are not `out * in` weights, or not `out` biases.
    pub fn from_float(
        isa: Isa,
        source: Source,
        (out, cols): (usize, usize),
        format: Format,
        bias: Option<&[f32]>,
    ) -> Result<Self> {
        if out * cols != source.len() {
            return Err(Error::invalid(
                "model",
                format!(
                    "a weight of shape [{out}, {cols}] has {} elements, but {} were given",
                    out * cols,
                    source.len()
                ),
            ));
        }
        let rows = (0..out).map(|row| source.row(row, cols));
        let weights = match format.code() {
            Some(code) => {
                let round = if code.bits == 4 {
                    round_int4
                } else {
                    round_int8
                };
                let rows = rows.map(|row| round(&row));
                Weights::Int(IntWeights::pack(code, out, cols, rows))
            }
            None => Weights::Float(FloatWeights::pack(format, out, cols, rows)),
        };
        Self::new(isa, out, cols, weights, bias)
    }

    /// Packs the blocks of a GGUF tensor `[out, in]` without loss.
    ///
    /// # Errors
    /// `invalid_value` if the bytes are not those of the shape, or not `out` biases are given.
    pub fn from_gguf(
        isa: Isa,
        block: BlockType,
        bytes: &[u8],
        (out, cols): (usize, usize),
        bias: Option<&[f32]>,
    ) -> Result<Self> {
        let row_bytes = cols / block.elements() * block.bytes();
        if !cols.is_multiple_of(block.elements()) || bytes.len() != out * row_bytes {
            return Err(Error::invalid(
                "model",
                format!(
                    "a {block:?} weight of shape [{out}, {cols}] has {} bytes in blocks of {} elements, but {} bytes were given",
                    out * row_bytes,
                    block.elements(),
                    bytes.len()
                ),
            ));
        }
        let rows = (0..out)
            .map(|row| -> IntRow { block.decode(&bytes[row * row_bytes..(row + 1) * row_bytes]) });
        let weights = Weights::Int(IntWeights::pack(block.code(), out, cols, rows));
        Self::new(isa, out, cols, weights, bias)
    }

    fn new(
        isa: Isa,
        out_features: usize,
        in_features: usize,
        weights: Weights,
        bias: Option<&[f32]>,
    ) -> Result<Self> {
        if let Some(bias) = bias
            && bias.len() != out_features
        {
            return Err(Error::invalid(
                "model",
                format!(
                    "a linear layer of {out_features} outputs takes as many biases, but {} were given",
                    bias.len()
                ),
            ));
        }
        let bias = bias.map(|bias| {
            let mut padded = Aligned::zeroed(out_features.next_multiple_of(TILE));
            padded[..out_features].copy_from_slice(bias);
            padded
        });
        Ok(Self {
            isa,
            out_features,
            in_features,
            weights,
            bias,
        })
    }

    /// One layer whose outputs are those of all `parts`, one after the other; the parts again if they cannot be one: where they
    /// differ in inputs, format or the presence of a bias, or one before the last has outputs that are no multiple of 16.
    ///
    /// # Errors
    /// The parts as they were.
    pub fn stack(parts: Vec<Self>) -> std::result::Result<Self, Vec<Self>> {
        let fits = |pair: &[Self]| {
            let (a, b) = (&pair[0], &pair[1]);
            a.out_features.is_multiple_of(TILE)
                && a.in_features == b.in_features
                && a.isa == b.isa
                && a.bias.is_some() == b.bias.is_some()
                && match (&a.weights, &b.weights) {
                    (Weights::Int(a), Weights::Int(b)) => a.code == b.code,
                    (Weights::Float(a), Weights::Float(b)) => a.format == b.format,
                    _ => false,
                }
        };
        if parts.is_empty() || !parts.windows(2).all(fits) {
            return Err(parts);
        }
        let biases: Vec<f32> = parts
            .iter()
            .flat_map(|part| part.bias.iter().flat_map(|bias| bias.iter().copied()))
            .collect();
        let weights = match &parts[0].weights {
            Weights::Int(_) => {
                let parts = parts.iter().filter_map(|part| match &part.weights {
                    Weights::Int(weights) => Some(weights),
                    Weights::Float(_) => None,
                });
                Weights::Int(IntWeights::concat(&parts.collect::<Vec<_>>()))
            }
            Weights::Float(_) => {
                let parts = parts.iter().filter_map(|part| match &part.weights {
                    Weights::Float(weights) => Some(weights),
                    Weights::Int(_) => None,
                });
                Weights::Float(FloatWeights::concat(&parts.collect::<Vec<_>>()))
            }
        };
        Ok(Self {
            isa: parts[0].isa,
            out_features: parts.iter().map(|part| part.out_features).sum(),
            in_features: parts[0].in_features,
            weights,
            bias: (!biases.is_empty()).then(|| Aligned::from_slice(&biases)),
        })
    }

    /// Moves the weights to memory that huge pages may hold: for a layer that stays, when it has its final form.
    pub fn settle(&mut self) {
        match &mut self.weights {
            Weights::Int(weights) => weights.settle(),
            Weights::Float(weights) => weights.settle(),
        }
    }

    /// Values in a row of the result.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Values in a row of the input.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Int(weights) => weights.bytes(),
            Weights::Float(weights) => weights.bytes(),
        }
    }

    /// Whether it multiplies integers, and so takes [`QuantizedRows`].
    pub fn is_quantized(&self) -> bool {
        matches!(self.weights, Weights::Int(_))
    }

    /// Bytes that `forward` needs beside input and output.
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
        x: Shared<f32>,
        rows: usize,
        y: Shared<f32>,
        scratch: Shared<u8>,
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
    pub unsafe fn forward_quantized(&self, team: &Team, x: &QuantizedRows, y: Shared<f32>) {
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

    fn output(&self, y: Shared<f32>) -> Output {
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

/// Bytes that packed weights `[rows, cols]` take: of a GGUF type, or of floats in `format`.
pub fn packed_bytes(block: Option<BlockType>, format: Format, rows: usize, cols: usize) -> usize {
    let tiles = rows.div_ceil(TILE);
    match (block.map(BlockType::code).or(format.code()), format) {
        (Some(code), _) => tiles * integers::tile_bytes(code, cols.div_ceil(GROUP)),
        (None, Format::F32) => tiles * TILE * cols * 4,
        (None, _) => tiles * TILE * cols * 2,
    }
}

/// Where results go: rows of `stride` values, plus a bias of whole tiles unless it is null.
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
mod tests;
