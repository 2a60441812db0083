//! Float weights in the order in which the kernels read them.

use crate::cpu::half::{bf16_to_f32, f16_to_f32};
use crate::cpu::memory::Aligned;

use super::{Format, Output, TILE, to_half};

/// Float weights `[out, in]` in tiles of 16 outputs, the last one padded with zeros. For each input, a tile has its 16 outputs.
#[derive(Clone)]
pub(super) struct FloatWeights {
    pub(super) format: Format,
    pub(super) tiles: usize,
    pub(super) cols: usize,
    pub(super) data: Data,
}

#[derive(Clone)]
pub(super) enum Data {
    Full(Aligned<f32>),
    Half(Aligned<u16>),
}

/// A multiplication by float weights.
pub(super) struct Task<'a> {
    pub(super) weights: &'a FloatWeights,
    pub(super) x: *const f32,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) output: Output,
}

// SAFETY: threads only read `x`.
unsafe impl Sync for Task<'_> {}

/// Some tiles of such weights, to be filled.
pub(super) struct FloatTiles<'a> {
    format: Format,
    cols: usize,
    data: Numbers<'a>,
}

enum Numbers<'a> {
    Full(&'a mut [f32]),
    Half(&'a mut [u16]),
}

impl FloatTiles<'_> {
    /// Packs one of the outputs of these tiles.
    pub(super) fn set_row(&mut self, row: usize, values: &[f32]) {
        let first = row / TILE * self.cols * TILE + row % TILE;
        for (col, &value) in values.iter().enumerate() {
            let at = first + col * TILE;
            match &mut self.data {
                Numbers::Full(data) => data[at] = value,
                Numbers::Half(data) => data[at] = to_half(self.format, value),
            }
        }
    }
}

impl FloatWeights {
    /// Weights that are all zero.
    pub(super) fn zeroed(format: Format, out: usize, cols: usize) -> Self {
        let len = count(out, cols);
        let data = match format {
            Format::F32 => Data::Full(Aligned::lasting(len)),
            _ => Data::Half(Aligned::lasting(len)),
        };
        Self::of_data(format, (out, cols), data)
    }

    /// Weights with these numbers.
    pub(super) fn of_data(format: Format, (out, cols): (usize, usize), data: Data) -> Self {
        let len = match &data {
            Data::Full(data) => data.len(),
            Data::Half(data) => data.len(),
        };
        assert_eq!(len, count(out, cols));
        Self {
            format,
            tiles: out.div_ceil(TILE),
            cols,
            data,
        }
    }

    /// All tiles, `tiles` at a time.
    pub(super) fn pieces(&mut self, tiles: usize) -> impl Iterator<Item = FloatTiles<'_>> {
        let (format, cols) = (self.format, self.cols);
        let len = (tiles * cols * TILE).max(1);
        let numbers: Vec<Numbers> = match &mut self.data {
            Data::Full(data) => data.chunks_mut(len).map(Numbers::Full).collect(),
            Data::Half(data) => data.chunks_mut(len).map(Numbers::Half).collect(),
        };
        numbers
            .into_iter()
            .map(move |data| FloatTiles { format, cols, data })
    }

    pub(super) fn bytes(&self) -> usize {
        match &self.data {
            Data::Full(data) => 4 * data.len(),
            Data::Half(data) => 2 * data.len(),
        }
    }

    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        for (col, out) in out.iter_mut().enumerate() {
            let at = (row / TILE * self.cols + col) * TILE + row % TILE;
            *out = match &self.data {
                Data::Full(data) => data[at],
                Data::Half(data) if self.format == Format::Bf16 => bf16_to_f32(data[at]),
                Data::Half(data) => f16_to_f32(data[at]),
            };
        }
    }
}

/// Number of elements of weights `[out, cols]`, including the padding of the last tile.
pub(super) const fn count(out: usize, cols: usize) -> usize {
    out.next_multiple_of(TILE) * cols
}
