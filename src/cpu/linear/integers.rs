//! Integer weights in the order in which kernels read them.

use crate::cpu::half::{f16_to_f32, f32_to_f16};
use crate::cpu::memory::Aligned;
use crate::cpu::quant::{Code, GROUP, IntRow};

use super::{Output, QuantizedRows, TILE};

/// Integer weights `[out, in]` in tiles of 16 outputs, the last filled up with zeros.
///
/// A tile has 32 inputs after 32 inputs. Of them, `q` has for each four inputs the 16 outputs side by side, `[8][16][4]`; with
/// 4 bits, the inputs 8i to 8i+3 are in the low halves of the bytes and 8i+4 to 8i+7 in the high ones. `scales` has for each
/// group of the code 16 scales, then 16 minima where there are any.
#[derive(Clone)]
pub(super) struct IntWeights {
    pub(super) code: Code,
    pub(super) tiles: usize,
    /// Steps of 32 inputs.
    pub(super) groups: usize,
    pub(super) q: Aligned<u8>,
    pub(super) scales: Aligned<u8>,
}

/// A multiplication with integer weights.
pub(super) struct Task<'a> {
    pub(super) weights: &'a IntWeights,
    pub(super) x: QuantizedRows<'a>,
    pub(super) output: Output,
}

impl IntWeights {
    pub(super) fn pack(
        code: Code,
        out: usize,
        cols: usize,
        rows: impl Iterator<Item = IntRow>,
    ) -> Self {
        let (tiles, groups) = (out.div_ceil(TILE), cols.div_ceil(GROUP));
        let mut packed = Self {
            code,
            tiles,
            groups,
            q: Aligned::zeroed(tiles * groups * group_bytes(code)),
            scales: Aligned::zeroed(tiles * groups * scale_bytes(code)),
        };
        for (at, row) in rows.enumerate() {
            packed.set_row(at, &row);
        }
        packed
    }

    pub(super) fn concat(parts: &[&Self]) -> Self {
        let bytes = |of: fn(&Self) -> &Aligned<u8>| {
            let parts: Vec<&[u8]> = parts.iter().map(|part| &**of(part)).collect();
            Aligned::from_slice(&parts.concat())
        };
        Self {
            code: parts[0].code,
            tiles: parts.iter().map(|part| part.tiles).sum(),
            groups: parts[0].groups,
            q: bytes(|part| &part.q),
            scales: bytes(|part| &part.scales),
        }
    }

    pub(super) fn settle(&mut self) {
        self.q = Aligned::lasting_from_slice(&self.q);
        self.scales = Aligned::lasting_from_slice(&self.scales);
    }

    pub(super) fn bytes(&self) -> usize {
        self.q.len() + self.scales.len()
    }

    /// Bytes of a tile's integers for 32 inputs.
    #[inline]
    pub(super) fn group_bytes(&self) -> usize {
        group_bytes(self.code)
    }

    /// Bytes of a tile's scales and minima for 32 inputs.
    #[inline]
    pub(super) fn scale_bytes(&self) -> usize {
        scale_bytes(self.code)
    }

    fn set_row(&mut self, row: usize, values: &IntRow) {
        let per_step = GROUP / self.code.group;
        let group_bytes = self.group_bytes();
        let first = row / TILE * self.groups * group_bytes + row % TILE * 4;
        let bits = self.code.bits;
        for (group, q) in values.q.chunks_exact(GROUP).enumerate() {
            let lines = &mut self.q[first + group * group_bytes..];
            if bits == 4 {
                for (step, q) in q.as_chunks::<8>().0.iter().enumerate() {
                    let to = &mut lines[step * 4 * TILE..][..4];
                    for (i, to) in to.iter_mut().enumerate() {
                        *to = q[i] | q[4 + i] << 4;
                    }
                }
            } else {
                for (step, q) in q.as_chunks::<4>().0.iter().enumerate() {
                    lines[step * 4 * TILE..][..4].copy_from_slice(q);
                }
            }
        }
        for (i, &scale) in values.scales.iter().enumerate() {
            self.set_scale(row, i / per_step, i % per_step, scale);
        }
        for (i, &min) in values.mins.iter().enumerate() {
            self.set_scale(row, i, 1, min);
        }
    }

    fn scale_place(&self, row: usize, step: usize, which: usize) -> usize {
        let size = if self.code.wide { 4 } else { 2 };
        let group = (row / TILE * self.groups + step) * self.scale_bytes();
        group + (which * TILE + row % TILE) * size
    }

    fn set_scale(&mut self, row: usize, step: usize, which: usize, value: f32) {
        let at = self.scale_place(row, step, which);
        if self.code.wide {
            self.scales[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        } else {
            self.scales[at..at + 2].copy_from_slice(&f32_to_f16(value).to_ne_bytes());
        }
    }

    fn scale(&self, row: usize, step: usize, which: usize) -> f32 {
        let at = self.scale_place(row, step, which);
        let bytes = &self.scales[at..];
        if self.code.wide {
            f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        } else {
            f16_to_f32(u16::from_ne_bytes([bytes[0], bytes[1]]))
        }
    }

    pub(super) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let zero = i32::from(self.code.zero());
        for (step, out) in out.chunks_mut(GROUP).enumerate() {
            let first = (row / TILE * self.groups + step) * self.group_bytes() + row % TILE * 4;
            let min = if self.code.min {
                self.scale(row, step, 1)
            } else {
                0.0
            };
            for (part, out) in out.chunks_mut(self.code.group).enumerate() {
                let scale = self.scale(row, step, part);
                for (i, out) in out.iter_mut().enumerate() {
                    let col = part * self.code.group + i;
                    let q = if self.code.bits == 4 {
                        let byte = self.q[first + col / 8 * 4 * TILE + col % 4];
                        byte >> (col / 4 % 2 * 4) & 0x0f
                    } else {
                        self.q[first + col / 4 * 4 * TILE + col % 4]
                    };
                    *out = scale * (i32::from(q) - zero) as f32;
                    if self.code.min {
                        *out += min;
                    }
                }
            }
        }
    }
}

const fn group_bytes(code: Code) -> usize {
    GROUP * TILE * code.bits / 8
}

/// Bytes of a tile's weights for 32 inputs.
pub(super) const fn step_bytes(code: Code) -> usize {
    group_bytes(code) + scale_bytes(code)
}

const fn scale_bytes(code: Code) -> usize {
    let size = if code.wide { 4 } else { 2 };
    (GROUP / code.group + code.min as usize) * TILE * size
}
