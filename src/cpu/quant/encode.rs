//! Floats to blocks of GGUF files: of the choices that a block has, those with the least weighted squared error.
//!
//! As in llama.cpp's `quantize_row_*_ref`, an error weighs more where the weight is larger: by the size of the weight and the root
//! mean square of its group together.

// All is compiled for the vectors of the function that calls it, which closures of the standard library are not.
#![allow(
    clippy::inline_always,
    clippy::needless_range_loop,
    clippy::manual_clamp
)]
// Names are those of formulas.
#![allow(clippy::many_single_char_names)]

#[cfg(test)]
mod tests;

use std::sync::{Mutex, PoisonError};

use super::{BlockType, rounded};
use crate::cpu::Pool;
use crate::cpu::half::{f16_to_f32, f32_to_f16};

/// Weights of a group that has a scale and a minimum.
const GROUP: usize = 32;
/// Weights of a group of `Q6_K`.
const SMALL: usize = 16;
const SUPER: usize = 256;
/// Largest scale or minimum of a group of `Q4_K` and `Q5_K`.
const SCALES: f32 = 63.0;
/// The factors of 256 weights are chosen for their integers, and the integers for the factors, in two rounds: those that are
/// nearest, and the best of those beside them.
const AROUND: [&[f32]; 2] = [&[0.0], &[-1.0, 0.0, 1.0]];

impl BlockType {
    /// Whether [`Self::encode`] knows it.
    pub const fn is_encoded(self) -> bool {
        matches!(
            self,
            Self::Q8_0 | Self::Q4_1 | Self::Q5_1 | Self::Q4_K | Self::Q5_K | Self::Q6_K
        )
    }

    /// Adds the blocks of `row` to `out`, the same on each processor. Its weights are finite, and their number is a multiple of
    /// [`Self::elements`].
    ///
    /// # Panics
    /// For a type that is not [encoded](Self::is_encoded).
    pub fn encode(self, row: &[f32], out: &mut Vec<u8>) {
        assert!(row.len().is_multiple_of(self.elements()));
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has it.
            return unsafe { encode_avx2(self, row, out) };
        }
        encode_blocks(self, row, out);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn encode_avx2(block: BlockType, row: &[f32], out: &mut Vec<u8>) {
    encode_blocks(block, row, out);
}

#[inline(always)]
fn encode_blocks(block: BlockType, row: &[f32], out: &mut Vec<u8>) {
    for weights in row.chunks_exact(block.elements()) {
        match block {
            BlockType::Q8_0 => eight_bits(weights, out),
            BlockType::Q4_1 => with_minimum(weights, 15.0, out),
            BlockType::Q5_1 => with_minimum(weights, 31.0, out),
            BlockType::Q4_K => nested(weights, 15.0, out),
            BlockType::Q5_K => nested(weights, 31.0, out),
            BlockType::Q6_K => six_bits(weights, out),
            _ => panic!("{block:?} is not encoded"),
        }
    }
}

/// The blocks of many weights, computed by the threads of a pool. As [`BlockType::encode`].
pub fn encode_all(block: BlockType, weights: &[f32], pool: &Pool) -> Vec<u8> {
    let elements = block.elements();
    let parts: Vec<Mutex<Vec<u8>>> = (0..pool.size()).map(|_| Mutex::default()).collect();
    pool.run(&|team| {
        let share = team.share(weights.len() / elements, 1);
        let mut part = parts[team.index()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        part.reserve(share.len() * block.bytes());
        block.encode(
            &weights[share.start * elements..share.end * elements],
            &mut part,
        );
    });
    let parts = parts
        .into_iter()
        .map(|part| part.into_inner().unwrap_or_else(PoisonError::into_inner));
    parts.collect::<Vec<_>>().concat()
}

#[inline(always)]
fn half(x: f32) -> f32 {
    f16_to_f32(f32_to_f16(x))
}

#[inline(always)]
fn push_half(out: &mut Vec<u8>, x: f32) {
    out.extend(f32_to_f16(x).to_le_bytes());
}

#[inline(always)]
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// The group that begins at `at`.
#[inline(always)]
fn group<const N: usize>(block: &[f32], at: usize) -> [f32; N] {
    std::array::from_fn(|i| block[at + i])
}

/// How much an error of each weight counts.
#[inline(always)]
fn importance<const N: usize>(x: &[f32; N]) -> [f32; N] {
    let mean = (x.iter().map(|x| x * x).sum::<f32>() / N as f32).sqrt();
    // Of zeros, all the same.
    x.map(|x| mean + x.abs() + f32::MIN_POSITIVE)
}

/// The weighted squared error of `scale * q - min`.
#[inline(always)]
fn error<const N: usize>(x: &[f32; N], w: &[f32; N], q: &[f32; N], scale: f32, min: f32) -> f32 {
    let mut parts = [0.0; 8];
    for at in (0..N).step_by(8) {
        for lane in 0..8 {
            let i = at + lane;
            let off = scale * q[i] - min - x[i];
            parts[lane] += w[i] * off * off;
        }
    }
    total(&parts)
}

#[inline(always)]
fn total(parts: &[f32; 8]) -> f32 {
    let mut sum = 0.0;
    for part in parts {
        sum += part;
    }
    sum
}

/// The integers from 0 to `top`, as floats, that come nearest with `scale * q - min`.
#[inline(always)]
fn nearest<const N: usize>(x: &[f32; N], scale: f32, min: f32, top: f32) -> [f32; N] {
    let (mut q, inverse) = (*x, inverse(scale));
    for q in &mut q {
        *q = rounded(((*q + min) * inverse).max(0.0).min(top));
    }
    q
}

/// Scale and minimum, both 0 or more: weights are `scale * q - min`.
#[inline(always)]
fn line(x: &[f32; GROUP], w: &[f32; GROUP], top: f32) -> (f32, f32) {
    let low = x.iter().copied().fold(0.0, f32::min);
    let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let range = high - low;
    if range <= 0.0 {
        return (0.0, -low);
    }
    let mut best = (range / top, -low);
    let q = nearest(x, best.0, best.1, top);
    let mut least = error(x, w, &q, best.0, best.1);
    for step in 0..=20 {
        let first = range / (top - 1.0 + 0.1 * step as f32);
        let q = nearest(x, first, -low, top);
        let (scale, min) = least_squares(x, w, &q);
        if scale <= 0.0 {
            continue;
        }
        // The integers that suit the line better than those that it was drawn through.
        let q = nearest(x, scale, min, top);
        let left = error(x, w, &q, scale, min);
        if left < least {
            (best, least) = ((scale, min), left);
        }
    }
    best
}

/// The line through the weights over their integers, whose minimum is not below 0.
#[inline(always)]
fn least_squares<const N: usize>(x: &[f32; N], w: &[f32; N], q: &[f32; N]) -> (f32, f32) {
    let [n, q_sum, x_sum, qq_sum, qx_sum] = sums(x, w, q);
    let spread = n * qq_sum - q_sum * q_sum;
    if spread <= 0.0 {
        return (0.0, 0.0);
    }
    let min = (q_sum * qx_sum - qq_sum * x_sum) / spread;
    if min <= 0.0 {
        return (qx_sum * inverse(qq_sum), 0.0);
    }
    ((n * qx_sum - q_sum * x_sum) / spread, min)
}

/// Sums of `w`, `w q`, `w x`, `w q q` and `w q x`, in eight parts that are computed side by side.
#[inline(always)]
fn sums<const N: usize>(x: &[f32; N], w: &[f32; N], q: &[f32; N]) -> [f32; 5] {
    let mut parts = [[0.0; 8]; 5];
    for at in (0..N).step_by(8) {
        for lane in 0..8 {
            let (x, w, q) = (x[at + lane], w[at + lane], q[at + lane]);
            parts[0][lane] += w;
            parts[1][lane] += w * q;
            parts[2][lane] += w * x;
            parts[3][lane] += w * q * q;
            parts[4][lane] += w * q * x;
        }
    }
    let mut found = [0.0; 5];
    for (found, part) in found.iter_mut().zip(&parts) {
        *found = total(part);
    }
    found
}

#[inline(always)]
fn eight_bits(block: &[f32], out: &mut Vec<u8>) {
    let largest = block.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
    let scale = largest / 127.0;
    let inverse = inverse(scale);
    push_half(out, scale);
    out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
}

/// A block of `Q4_1` or `Q5_1`: half-precision scale and minimum of their own.
#[inline(always)]
fn with_minimum(block: &[f32], top: f32, out: &mut Vec<u8>) {
    let x = group::<GROUP>(block, 0);
    // Its minimum may have either sign: what is fitted lies at 0 and above.
    let low = x.iter().copied().fold(f32::INFINITY, f32::min);
    let (scale, min) = line(&x.map(|x| x - low), &importance(&x), top);
    let (scale, min) = (half(scale), half(low - min));
    let q = nearest(&x, scale, -min, top).map(|q| q as u8);
    push_half(out, scale);
    push_half(out, min);
    if top > 15.0 {
        let high = (0..GROUP).fold(0, |high, i| high | u32::from(q[i] >> 4) << i);
        out.extend(high.to_le_bytes());
    }
    out.extend((0..GROUP / 2).map(|i| q[i] & 15 | q[i + GROUP / 2] << 4));
}

/// A block of `Q4_K` or `Q5_K`: eight groups, whose scales and minima are integers of 6 bits times two factors.
#[inline(always)]
fn nested(block: &[f32], top: f32, out: &mut Vec<u8>) {
    const GROUPS: usize = SUPER / GROUP;
    let x: [[f32; GROUP]; GROUPS] = std::array::from_fn(|at| group(block, at * GROUP));
    let w = x.map(|x| importance(&x));
    let lines: [(f32, f32); GROUPS] = std::array::from_fn(|at| line(&x[at], &w[at], top));
    let largest = |of: fn(&(f32, f32)) -> f32| lines.iter().map(of).fold(0.0, f32::max);
    let mut factors = (
        half(largest(|l| l.0) / SCALES),
        half(largest(|l| l.1) / SCALES),
    );
    let mut best = (f32::INFINITY, factors, [(0.0, 0.0); GROUPS]);
    for around in AROUND {
        let mut whole = 0.0;
        let scales: [(f32, f32); GROUPS] = std::array::from_fn(|at| {
            let (found, left) = integers(&x[at], &w[at], lines[at], factors, top, around);
            whole += left;
            found
        });
        if whole < best.0 {
            best = (whole, factors, scales);
        }
        factors = refit(&x, &w, &scales, factors, top);
    }
    let (_, (scale, min), integers) = best;
    push_half(out, scale);
    push_half(out, min);
    let mut packed = [0; 12];
    for (i, (s, m)) in integers.map(|(s, m)| (s as u8, m as u8)).iter().enumerate() {
        if i < 4 {
            packed[i] |= s;
            packed[i + 4] |= m;
        } else {
            packed[i + 4] = s & 15 | m << 4;
            packed[i - 4] |= s >> 4 << 6;
            packed[i] |= m >> 4 << 6;
        }
    }
    out.extend(packed);
    let q: [[u8; GROUP]; GROUPS] = std::array::from_fn(|at| {
        let (s, m) = integers[at];
        nearest(&x[at], scale * s, min * m, top).map(|q| q as u8)
    });
    if top > 15.0 {
        out.extend((0..GROUP).map(|i| (0..GROUPS).fold(0, |bits, at| bits | q[at][i] >> 4 << at)));
    }
    for pair in q.chunks_exact(2) {
        out.extend((0..GROUP).map(|i| pair[0][i] & 15 | pair[1][i] << 4));
    }
}

/// Of the integers around a group's line over the factors, those that leave the least error, and that.
#[inline(always)]
fn integers(
    x: &[f32; GROUP],
    w: &[f32; GROUP],
    line: (f32, f32),
    factors: (f32, f32),
    top: f32,
    around: &[f32],
) -> ((f32, f32), f32) {
    let candidates = |value: f32, factor: f32| {
        let middle = (value * inverse(factor)).round();
        around
            .iter()
            .map(move |step| (middle + step).clamp(0.0, SCALES))
    };
    let mut best = ((0.0, 0.0), f32::INFINITY);
    for s in candidates(line.0, factors.0) {
        for m in candidates(line.1, factors.1) {
            let (scale, min) = (factors.0 * s, factors.1 * m);
            let q = nearest(x, scale, min, top);
            let left = error(x, w, &q, scale, min);
            if left < best.1 {
                best = ((s, m), left);
            }
        }
    }
    best
}

/// The factors that suit these integers best; those that are given where nothing says which.
#[inline(always)]
fn refit(
    x: &[[f32; GROUP]],
    w: &[[f32; GROUP]],
    scales: &[(f32, f32)],
    factors: (f32, f32),
    top: f32,
) -> (f32, f32) {
    let [mut aa, mut ab, mut bb, mut ax, mut bx] = [0.0_f64; 5];
    for ((x, w), &(s, m)) in x.iter().zip(w).zip(scales) {
        let q = nearest(x, factors.0 * s, factors.1 * m, top);
        for i in 0..GROUP {
            let [a, b, x, w] = [s * q[i], -m, x[i], w[i]].map(f64::from);
            aa += w * a * a;
            ab += w * a * b;
            bb += w * b * b;
            ax += w * a * x;
            bx += w * b * x;
        }
    }
    let spread = aa * bb - ab * ab;
    let (scale, min) = if spread > 0.0 {
        ((ax * bb - bx * ab) / spread, (bx * aa - ax * ab) / spread)
    } else if aa > 0.0 {
        (ax / aa, f64::from(factors.1))
    } else {
        return factors;
    };
    if scale <= 0.0 || min < 0.0 {
        return factors;
    }
    (half(scale as f32), half(min as f32))
}

/// A block of `Q6_K`: sixteen groups of integers from -32 to 31, whose scales are integers of 8 bits times a factor.
#[inline(always)]
fn six_bits(block: &[f32], out: &mut Vec<u8>) {
    const GROUPS: usize = SUPER / SMALL;
    let x: [[f32; SMALL]; GROUPS] = std::array::from_fn(|at| group(block, at * SMALL));
    let w = x.map(|x| importance(&x));
    let scales: [f32; GROUPS] = std::array::from_fn(|at| signed_scale(&x[at], &w[at]));
    let largest = scales.iter().fold(
        0.0,
        |max: f32, scale| {
            if scale.abs() > max.abs() { *scale } else { max }
        },
    );
    let factor = half(largest / -128.0);
    let integers: [f32; GROUPS] = std::array::from_fn(|at| {
        let middle = (scales[at] * inverse(factor)).round();
        let left = |&integer: &f32| {
            let q = signed(&x[at], factor * integer);
            error(&x[at], &w[at], &q, factor * integer, 0.0)
        };
        [0.0, -1.0, 1.0]
            .map(|step| (middle + step).clamp(-128.0, 127.0))
            .into_iter()
            .min_by(|a, b| left(a).total_cmp(&left(b)))
            .unwrap_or(0.0)
    });
    let q: Vec<u8> = (0..GROUPS)
        .flat_map(|at| signed(&x[at], factor * integers[at]).map(|q| (q + 32.0) as u8))
        .collect();
    for part in q.chunks_exact(SUPER / 2) {
        out.extend((0..64).map(|i| part[i] & 15 | part[i + 64] << 4));
    }
    for part in q.chunks_exact(SUPER / 2) {
        out.extend(
            (0..32).map(|i| (0..4).fold(0, |bits, at| bits | part[32 * at + i] >> 4 << (2 * at))),
        );
    }
    out.extend(integers.map(|integer| integer as i8 as u8));
    push_half(out, factor);
}

/// The integers from -32 to 31, as floats, that come nearest with `scale * q`.
#[inline(always)]
fn signed(x: &[f32; SMALL], scale: f32) -> [f32; SMALL] {
    let (mut q, inverse) = (*x, inverse(scale));
    for q in &mut q {
        *q = rounded((*q * inverse).max(-32.0).min(31.0));
    }
    q
}

/// A scale, of either sign: there is one integer more below 0 than above.
#[inline(always)]
fn signed_scale(x: &[f32; SMALL], w: &[f32; SMALL]) -> f32 {
    let largest = x.iter().fold(
        0.0,
        |max: f32, x| if x.abs() > max.abs() { *x } else { max },
    );
    let mut best = (0.0, f32::INFINITY);
    for step in -9..=9 {
        let q = signed(x, largest / (-32.0 + 0.1 * step as f32));
        let [_, _, _, qq_sum, qx_sum] = sums(x, w, &q);
        let scale = qx_sum * inverse(qq_sum);
        let q = signed(x, scale);
        let left = error(x, w, &q, scale, 0.0);
        if left < best.1 {
            best = (scale, left);
        }
    }
    best.0
}
