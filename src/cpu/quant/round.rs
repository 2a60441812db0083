//! Rounds floats to groups of integers.

use super::{GROUP, IntRow};
use crate::cpu::half::{f16_to_f32, f32_to_f16};

/// Appends the weights of `row` (at most the last group is not full; it is filled up with zeros) as 8-bit integers around 128
/// with half-precision scales.
pub fn round_int8(row: &[f32]) -> IntRow {
    let mut out = IntRow::default();
    for group in row.chunks(GROUP) {
        let largest = group.iter().fold(0.0, |max: f32, w| max.max(w.abs()));
        let scale = f16_to_f32(f32_to_f16(largest / 127.0));
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        out.scales.push(scale);
        out.q.extend(
            group
                .iter()
                .map(|w| ((w * inverse).round_ties_even().clamp(-127.0, 127.0) as i32 + 128) as u8),
        );
        out.q.resize(out.scales.len() * GROUP, 128);
    }
    out
}

/// Appends the weights of `row` (at most the last group is not full; it is filled up with zeros) as 4-bit integers with
/// half-precision scales and minima, chosen for the least squared error.
pub fn round_int4(row: &[f32]) -> IntRow {
    let mut out = IntRow::default();
    for group in row.chunks(GROUP) {
        let mut full = [0.0; GROUP];
        full[..group.len()].copy_from_slice(group);
        let (scale, min) = fit(&full);
        out.q.extend(full.map(|w| nearest(w, scale, min)));
        out.scales.push(scale);
        out.mins.push(min);
    }
    out
}

fn nearest(weight: f32, scale: f32, min: f32) -> u8 {
    if scale == 0.0 {
        return 0;
    }
    ((weight - min) / scale).round_ties_even().clamp(0.0, 15.0) as u8
}

/// Scale and minimum, representable in half precision. From the range of the group, shrunk by several factors, a least squares
/// fit to the integers which that gives; the best of all by what remains.
fn fit(group: &[f32; GROUP]) -> (f32, f32) {
    let low = group.iter().copied().fold(f32::INFINITY, f32::min);
    let high = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let representable = |scale: f32, min: f32| {
        let round = |x| f16_to_f32(f32_to_f16(x));
        (round(scale), round(min))
    };
    let error = |(scale, min): (f32, f32)| -> f32 {
        let errors = group
            .iter()
            .map(|&w| w - f32::from(nearest(w, scale, min)) * scale - min);
        errors.map(|e| e * e).sum()
    };
    let mut best = representable((high - low) / 15.0, low);
    let mut least = error(best);
    for step in 0..16 {
        let inset = (high - low) * (step as f32 - 2.0) / 100.0;
        let mut candidate = ((high - low - 2.0 * inset) / 15.0, low + inset);
        for _ in 0..2 {
            if candidate.0 <= 0.0 {
                break;
            }
            candidate = least_squares(group, candidate);
            let stored = representable(candidate.0, candidate.1);
            let left = error(stored);
            if left < least {
                (best, least) = (stored, left);
            }
        }
    }
    best
}

/// The line through the weights over their integers under the given scale and minimum.
fn least_squares(group: &[f32; GROUP], (scale, min): (f32, f32)) -> (f32, f32) {
    let (mut q_sum, mut qq_sum, mut w_sum, mut qw_sum) = (0.0, 0.0, 0.0, 0.0);
    for &w in group {
        let q = f32::from(nearest(w, scale, min));
        q_sum += q;
        qq_sum += q * q;
        w_sum += w;
        qw_sum += q * w;
    }
    let n = GROUP as f32;
    let spread = n * qq_sum - q_sum * q_sum;
    if spread <= 0.0 {
        return (scale, min);
    }
    let scale = (n * qw_sum - q_sum * w_sum) / spread;
    (scale, (w_sum - scale * q_sum) / n)
}
