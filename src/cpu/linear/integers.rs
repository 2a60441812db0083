//! Integer weights in the order in which kernels read them.

use crate::cpu::half::{f16_to_f32, f32_to_f16};
use crate::cpu::memory::Aligned;
use crate::cpu::quant::{Code, GROUP, IntRow, SUPER};

use super::{Output, QuantizedRows, TILE};

/// Bytes of a line: four inputs of the 16 outputs of a tile.
const LINE: usize = 4 * TILE;
/// Steps of 32 inputs whose nested scales share factors.
pub(super) const SHARED: usize = SUPER / GROUP;

/// Integer weights `[out, in]` in tiles of 16 outputs, the last filled up with zeros.
///
/// A tile has 32 inputs after 32 inputs, a step. Of them, `q` has for each four inputs the 16 outputs side by side, `[8][16][4]`. With
/// 4 bits, the inputs 8i to 8i+3 are in the low halves of the bytes and 8i+4 to 8i+7 in the high ones; with 6 bits the upper two
/// follow these lines, in each byte those of the inputs j, j+4, j+8 and j+12, the lowest first. Integers of 2 bits are like these.
///
/// `scales` has for each group of the code 16 scales, then for each 16 minima where there are any. Nested ones are single bytes, and before
/// those of 8 steps stand 16 factors of scales, and 16 of minima where there are any.
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

/// Some tiles of such weights, to be written.
pub(super) struct IntTiles<'a> {
    layout: Layout,
    q: &'a mut [u8],
    scales: &'a mut [u8],
}

/// Where things stand in tiles.
#[derive(Clone, Copy)]
struct Layout {
    code: Code,
    groups: usize,
}

impl IntWeights {
    /// Weights whose integers and scales are all zero.
    pub(super) fn zeroed(code: Code, out: usize, cols: usize) -> Self {
        let (tiles, groups) = (out.div_ceil(TILE), cols.div_ceil(GROUP));
        let [q, scales] = array_bytes(code, out, cols);
        Self {
            code,
            tiles,
            groups,
            q: Aligned::lasting(q),
            scales: Aligned::lasting(scales),
        }
    }

    /// Weights whose integers and scales are these.
    pub(super) fn of_arrays(
        code: Code,
        (out, cols): (usize, usize),
        q: Aligned<u8>,
        scales: Aligned<u8>,
    ) -> Self {
        assert_eq!([q.len(), scales.len()], array_bytes(code, out, cols));
        let (tiles, groups) = (out.div_ceil(TILE), cols.div_ceil(GROUP));
        Self {
            code,
            tiles,
            groups,
            q,
            scales,
        }
    }

    /// All tiles, `tiles` at a time.
    pub(super) fn pieces(&mut self, tiles: usize) -> impl Iterator<Item = IntTiles<'_>> {
        let layout = self.layout();
        let q = self.groups * group_bytes(self.code);
        let scales = tile_scale_bytes(self.code, self.groups);
        let scales = self.scales.chunks_mut((tiles * scales).max(1));
        let q = self.q.chunks_mut((tiles * q).max(1));
        q.zip(scales)
            .map(move |(q, scales)| IntTiles { layout, q, scales })
    }

    fn layout(&self) -> Layout {
        Layout {
            code: self.code,
            groups: self.groups,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.q.len() + self.scales.len()
    }

    /// Bytes of a tile.
    pub(super) fn tile_bytes(&self) -> usize {
        tile_bytes(self.code, self.groups)
    }

    fn half(&self, at: usize) -> f32 {
        f16_to_f32(u16::from_ne_bytes([self.scales[at], self.scales[at + 1]]))
    }

    /// A scale or, behind those of a step, a minimum of an output.
    pub(super) fn scale(&self, row: usize, step: usize, which: usize) -> f32 {
        let at = self.layout().scale_at(row, step, which);
        if !self.code.nested {
            return self.half(at);
        }
        let is_min = which >= GROUP / self.code.group;
        let factor =
            self.layout().factors_at(row, step) + (usize::from(is_min) * TILE + row % TILE) * 2;
        f32::from(self.scales[at] as i8) * self.half(factor)
    }

    /// The minimum of a part of a step, of an output.
    pub(super) fn min(&self, row: usize, step: usize, part: usize) -> f32 {
        self.scale(row, step, GROUP / self.code.group + part)
    }

    /// The integers of an output in a step.
    pub(super) fn integers(&self, row: usize, step: usize) -> [u8; GROUP] {
        let first = self.layout().first_byte(row, step);
        let mut q = [0; GROUP];
        for (i, q) in q.iter_mut().enumerate() {
            let (at, shift) = place(self.code, i);
            *q = self.q[first + at] >> shift;
            if self.code.bits != 8 {
                *q &= (1 << self.code.bits.min(4)) - 1;
            }
            if self.code.bits == 6 {
                let (at, shift) = upper_place(i);
                *q |= (self.q[first + at] >> shift & 3) << 4;
            }
        }
        q
    }

    pub(super) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        for (step, out) in out.chunks_mut(GROUP).enumerate() {
            let q = self.integers(row, step);
            let parts = out.chunks_mut(self.code.group);
            for (part, (out, q)) in parts.zip(q.chunks(self.code.group)).enumerate() {
                let scale = self.scale(row, step, part);
                let min = self.code.min.then(|| self.min(row, step, part));
                for (out, &q) in out.iter_mut().zip(q) {
                    *out = scale * self.code.value(q) as f32;
                    if let Some(min) = min {
                        *out += min;
                    }
                }
            }
        }
    }
}

impl IntTiles<'_> {
    /// Packs one of the outputs of these tiles.
    pub(super) fn set_row(&mut self, row: usize, values: &IntRow) {
        let code = self.layout.code;
        for (step, q) in values.q.as_chunks::<GROUP>().0.iter().enumerate() {
            let first = self.layout.first_byte(row, step);
            let mut lines = self.q[first..].chunks_mut(LINE);
            if code.bits == 8 {
                for (q, line) in q.as_chunks::<4>().0.iter().zip(&mut lines) {
                    line[..4].copy_from_slice(q);
                }
                continue;
            }
            if code.bits != 2 {
                for (q, line) in q.as_chunks::<8>().0.iter().zip(&mut lines) {
                    for i in 0..4 {
                        line[i] = q[i] & 0x0f | q[4 + i] << 4;
                    }
                }
            }
            let lower = if code.bits == 2 { 0 } else { 4 };
            if code.bits != 4 {
                for (q, line) in q.as_chunks::<16>().0.iter().zip(&mut lines) {
                    for i in 0..4 {
                        let two = |k: usize| (q[4 * k + i] >> lower) << (2 * k);
                        line[i] = two(0) | two(1) | two(2) | two(3);
                    }
                }
            }
        }
        let per_step = GROUP / code.group;
        for (i, &scale) in values.scales.iter().enumerate() {
            self.set_scale(row, i / per_step, i % per_step, scale);
        }
        for (i, &min) in values.mins.iter().enumerate() {
            self.set_scale(row, i / per_step, per_step + i % per_step, min);
        }
        for (i, factors) in values.factors.iter().enumerate() {
            let first = self.layout.factors_at(row, i * SHARED);
            for (which, &factor) in factors[..=usize::from(code.min)].iter().enumerate() {
                let at = first + (which * TILE + row % TILE) * 2;
                self.scales[at..at + 2].copy_from_slice(&f32_to_f16(factor).to_ne_bytes());
            }
        }
    }

    fn set_scale(&mut self, row: usize, step: usize, which: usize, value: f32) {
        let at = self.layout.scale_at(row, step, which);
        if self.layout.code.nested {
            self.scales[at] = value as i8 as u8;
        } else {
            self.scales[at..at + 2].copy_from_slice(&f32_to_f16(value).to_ne_bytes());
        }
    }
}

impl Layout {
    /// Where the integers of an output in a step begin.
    fn first_byte(&self, row: usize, step: usize) -> usize {
        (row / TILE * self.groups + step) * group_bytes(self.code) + row % TILE * 4
    }

    /// Where the factors of a tile's nested scales stand.
    fn factors_at(&self, row: usize, step: usize) -> usize {
        row / TILE * tile_scale_bytes(self.code, self.groups)
            + step / SHARED * (factor_bytes(self.code) + SHARED * scale_bytes(self.code))
    }

    /// Where a scale stands or, after those of a step, a minimum.
    fn scale_at(&self, row: usize, step: usize, which: usize) -> usize {
        let in_step = (which * TILE + row % TILE) * scale_size(self.code);
        let step = if self.code.nested {
            self.factors_at(row, step)
                + factor_bytes(self.code)
                + step % SHARED * scale_bytes(self.code)
        } else {
            (row / TILE * self.groups + step) * scale_bytes(self.code)
        };
        step + in_step
    }
}

/// Byte and shift of an input's integer, or of its lower four bits.
const fn place(code: Code, i: usize) -> (usize, usize) {
    match code.bits {
        8 => (i / 4 * LINE + i % 4, 0),
        2 => (i / 16 * LINE + i % 4, i / 4 % 4 * 2),
        _ => (i / 8 * LINE + i % 4, i / 4 % 2 * 4),
    }
}

/// Byte and shift of the upper two bits of six.
const fn upper_place(i: usize) -> (usize, usize) {
    ((4 + i / 16) * LINE + i % 4, i / 4 % 4 * 2)
}

/// Bytes of a tile's integers for 32 inputs.
const fn group_bytes(code: Code) -> usize {
    GROUP * TILE * code.bits / 8
}

const fn scale_size(code: Code) -> usize {
    if code.nested { 1 } else { 2 }
}

/// Bytes of a tile's scales and minima for 32 inputs.
const fn scale_bytes(code: Code) -> usize {
    GROUP / code.group * (1 + code.min as usize) * TILE * scale_size(code)
}

/// Bytes of a tile's factors for 256 inputs.
const fn factor_bytes(code: Code) -> usize {
    if code.nested {
        (1 + code.min as usize) * TILE * 2
    } else {
        0
    }
}

const fn tile_scale_bytes(code: Code, groups: usize) -> usize {
    groups * scale_bytes(code) + groups / SHARED * factor_bytes(code)
}

/// Bytes of the integers and of the scales of weights `[out, cols]`.
pub(super) const fn array_bytes(code: Code, out: usize, cols: usize) -> [usize; 2] {
    let (tiles, groups) = (out.div_ceil(TILE), cols.div_ceil(GROUP));
    [
        tiles * groups * group_bytes(code),
        tiles * tile_scale_bytes(code, groups),
    ]
}

/// Bytes of a tile of weights with `groups` times 32 inputs.
pub(super) const fn tile_bytes(code: Code, groups: usize) -> usize {
    groups * group_bytes(code) + tile_scale_bytes(code, groups)
}
