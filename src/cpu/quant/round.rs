//! Rounds floats to groups of integers.

use super::{GROUP, IntRow, rounded};
use crate::cpu::half::{f16_to_f32, f32_to_f16};

/// Integers cannot say that a weight is no number: the scale of its group does.
fn is_finite(group: &[f32]) -> bool {
    group.iter().all(|w| w.is_finite())
}

/// Makes `out` the weights of `row` (at most the last group is not full; it is filled up with zeros) as 8-bit integers around 128
/// with half-precision scales.
pub fn round_int8(row: &[f32], out: &mut IntRow) {
    out.clear();
    for group in row.chunks(GROUP) {
        let largest = group.iter().fold(0.0, |max: f32, w| max.max(w.abs()));
        let largest = if is_finite(group) { largest } else { f32::NAN };
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
}

/// Makes `out` the weights of `row` (at most the last group is not full; it is filled up with zeros) as 4-bit integers with
/// half-precision scales and minima, chosen for the least squared error.
pub fn round_int4(row: &[f32], out: &mut IntRow) {
    out.clear();
    for group in row.chunks(GROUP) {
        let mut full = [0.0; GROUP];
        full[..group.len()].copy_from_slice(group);
        let (scale, min) = if is_finite(group) {
            fit(&full)
        } else {
            (f32::NAN, f32::NAN)
        };
        out.q.extend(nearest(&full, scale, min).map(|q| q as u8));
        out.scales.push(scale);
        out.mins.push(min);
    }
}

/// The integers, still as floats, that come nearest to the group with this scale and minimum.
fn nearest(group: &[f32; GROUP], scale: f32, min: f32) -> [f32; GROUP] {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    group.map(|w| rounded(((w - min) * inverse).clamp(0.0, 15.0)))
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
        let q = nearest(group, scale, min);
        sum(|i| (group[i] - q[i] * scale - min).powi(2))
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

/// The sum over a group, in eight parts that are computed side by side.
fn sum(term: impl Fn(usize) -> f32) -> f32 {
    let mut parts = [0.0; 8];
    for i in (0..GROUP).step_by(8) {
        for (part, at) in parts.iter_mut().zip(i..) {
            *part += term(at);
        }
    }
    parts.iter().sum()
}

/// The line through the weights over their integers under the given scale and minimum.
fn least_squares(group: &[f32; GROUP], (scale, min): (f32, f32)) -> (f32, f32) {
    let q = nearest(group, scale, min);
    let (q_sum, w_sum) = (sum(|i| q[i]), sum(|i| group[i]));
    let (qq_sum, qw_sum) = (sum(|i| q[i] * q[i]), sum(|i| q[i] * group[i]));
    let n = GROUP as f32;
    let spread = n * qq_sum - q_sum * q_sum;
    if spread <= 0.0 {
        return (scale, min);
    }
    let scale = (n * qw_sum - q_sum * w_sum) / spread;
    (scale, (w_sum - scale * q_sum) / n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::quant::{Code, near_normal};

    fn code(bits: usize, min: bool) -> Code {
        Code {
            bits,
            group: GROUP,
            nested: false,
            min,
            table: None,
        }
    }

    fn int8(row: &[f32]) -> IntRow {
        let mut out = IntRow::default();
        round_int8(row, &mut out);
        out
    }

    fn int4(row: &[f32]) -> IntRow {
        let mut out = IntRow::default();
        round_int4(row, &mut out);
        out
    }

    fn squared_error(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn eight_bits_round_to_the_nearest() {
        let row = near_normal(1, 64 * GROUP);
        let rounded = int8(&row);
        let values = rounded.dequantize(code(8, false));
        for (i, (w, v)) in row.iter().zip(&values).enumerate() {
            // The largest weights may be cut by as much as the scale is rounded.
            let scale = rounded.scales[i / GROUP];
            assert!((w - v).abs() <= 0.57 * scale, "{w} {v} {scale}");
        }
    }

    #[test]
    fn four_bits_err_less_than_between_the_extremes() {
        let row = near_normal(1, 64 * GROUP);
        let values = int4(&row).dequantize(code(4, true));
        let extremes: Vec<f32> = row
            .chunks(GROUP)
            .flat_map(|group| {
                let low = group.iter().copied().fold(f32::INFINITY, f32::min);
                let high = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let scale = (high - low) / 15.0;
                group
                    .iter()
                    .map(move |w| low + scale * ((w - low) / scale).round())
            })
            .collect();
        let (ours, plain) = (squared_error(&row, &values), squared_error(&row, &extremes));
        assert!(ours < 0.88 * plain, "{ours} {plain}");
    }

    #[test]
    fn values_on_a_grid_and_constants_are_kept() {
        let grid: Vec<f32> = (0..GROUP).map(|i| 0.5 * (i % 16) as f32 - 3.0).collect();
        assert_eq!(int4(&grid).dequantize(code(4, true)), grid);
        for constant in [0.0, 0.75, -2.0] {
            let row = [constant; GROUP];
            assert_eq!(int4(&row).dequantize(code(4, true)), row);
        }
        let zeros = [0.0; GROUP];
        assert_eq!(int8(&zeros).dequantize(code(8, false)), zeros);
    }

    #[test]
    fn the_last_group_is_filled_up() {
        let row = near_normal(1, GROUP + 5);
        for (rounded, code) in [(int4(&row), code(4, true)), (int8(&row), code(8, false))] {
            assert_eq!((rounded.q.len(), rounded.scales.len()), (2 * GROUP, 2));
            let error = squared_error(&row, &rounded.dequantize(code)[..row.len()]);
            assert!(error < 0.01 * squared_error(&row, &vec![0.0; row.len()]));
        }
    }
}
