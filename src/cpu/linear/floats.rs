//! Float weights in the order in which kernels read them.

use crate::cpu::half::{bf16_to_f32, f16_to_f32};
use crate::cpu::memory::Aligned;

use super::{Format, Output, TILE, to_half};

/// Float weights `[out, in]` in tiles of 16 outputs, the last filled up with zeros: for each input the 16 outputs.
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

/// A multiplication with float weights.
pub(super) struct Task<'a> {
    pub(super) weights: &'a FloatWeights,
    pub(super) x: *const f32,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) output: Output,
}

// SAFETY: threads only read `x`.
unsafe impl Sync for Task<'_> {}

impl FloatWeights {
    pub(super) fn pack(
        format: Format,
        out: usize,
        cols: usize,
        rows: impl Iterator<Item = Vec<f32>>,
    ) -> Self {
        let tiles = out.div_ceil(TILE);
        let len = tiles * cols * TILE;
        let mut data = match format {
            Format::F32 => Data::Full(Aligned::zeroed(len)),
            _ => Data::Half(Aligned::zeroed(len)),
        };
        for (row, values) in rows.enumerate() {
            for (col, value) in values.into_iter().enumerate() {
                let at = (row / TILE * cols + col) * TILE + row % TILE;
                match &mut data {
                    Data::Full(data) => data[at] = value,
                    Data::Half(data) => data[at] = to_half(format, value),
                }
            }
        }
        Self {
            format,
            tiles,
            cols,
            data,
        }
    }

    pub(super) fn concat(parts: &[&Self]) -> Self {
        let data = match &parts[0].data {
            Data::Full(_) => {
                let parts = parts.iter().filter_map(|part| match &part.data {
                    Data::Full(data) => Some(&**data),
                    Data::Half(_) => None,
                });
                Data::Full(Aligned::from_slice(&parts.collect::<Vec<_>>().concat()))
            }
            Data::Half(_) => {
                let parts = parts.iter().filter_map(|part| match &part.data {
                    Data::Half(data) => Some(&**data),
                    Data::Full(_) => None,
                });
                Data::Half(Aligned::from_slice(&parts.collect::<Vec<_>>().concat()))
            }
        };
        Self {
            format: parts[0].format,
            tiles: parts.iter().map(|part| part.tiles).sum(),
            cols: parts[0].cols,
            data,
        }
    }

    pub(super) fn settle(&mut self) {
        match &mut self.data {
            Data::Full(data) => *data = Aligned::lasting_from_slice(data),
            Data::Half(data) => *data = Aligned::lasting_from_slice(data),
        }
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
