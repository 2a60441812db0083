//! Rows to integers with AVX2.

use std::arch::x86_64::*;

use super::super::super::BLOCK;
use super::super::super::record::{RECORD, Span, Target};
use super::LANES;
use crate::cpu::quant::GROUP;

/// # Safety
/// The processor has the instructions, and there are records for all groups, which nobody else touches.
#[target_feature(enable = "avx2,fma")]
pub(in super::super) unsafe fn quantize(values: &[f32], mut target: Target) {
    for group in values.chunks(GROUP) {
        let mut full = [0.0; GROUP];
        full[..group.len()].copy_from_slice(group);
        let mut q = [0; GROUP];
        // SAFETY: the arrays have 32 values; the caller's promise about the target.
        unsafe {
            let mut x = [_mm256_setzero_ps(); 4];
            let (mut most, mut least) = (_mm256_setzero_ps(), _mm256_setzero_ps());
            for i in 0..4 {
                x[i] = _mm256_loadu_ps(full.as_ptr().add(i * LANES));
                most = _mm256_max_ps(most, x[i]);
                least = _mm256_min_ps(least, x[i]);
            }
            let minus_least = _mm256_sub_ps(_mm256_setzero_ps(), least);
            let span = Span::new(largest(most), largest(minus_least));
            let inverse = _mm256_set1_ps(span.inverse);
            let zero = _mm256_set1_epi32(span.zero);
            let mut i = [_mm256_setzero_si256(); 4];
            for part in 0..4 {
                let rounded = _mm256_cvtps_epi32(_mm256_mul_ps(x[part], inverse));
                i[part] = _mm256_sub_epi32(rounded, zero);
                i[part] = _mm256_min_epi32(i[part], _mm256_set1_epi32(127));
            }
            let words = [
                _mm256_packs_epi32(i[0], i[1]),
                _mm256_packs_epi32(i[2], i[3]),
            ];
            // Packing leaves the four-byte pieces of both halves in turn.
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let bytes = _mm256_packs_epi16(words[0], words[1]);
            let bytes = _mm256_permutevar8x32_epi32(bytes, order);
            _mm256_storeu_si256(q.as_mut_ptr().cast(), bytes);
            let first_sum = total(_mm256_add_epi32(i[0], i[1]));
            let sum = first_sum + total(_mm256_add_epi32(i[2], i[3]));
            target.push(&q, span, sum, first_sum);
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn largest(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn total(sums: __m256i) -> i32 {
    let sums = _mm_add_epi32(
        _mm256_castsi256_si128(sums),
        _mm256_extracti128_si256::<1>(sums),
    );
    let sums = _mm_add_epi32(sums, _mm_shuffle_epi32::<0b00_00_11_10>(sums));
    _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32::<1>(sums)))
}

/// The same as [`quantize`] for the four rows of a block at once, whose lengths are whole groups.
///
/// # Safety
/// As for [`quantize`]; `values` ends with the last of four rows `stride` apart.
#[target_feature(enable = "avx2,fma")]
pub(in super::super) unsafe fn quantize_block(values: &[f32], stride: usize, mut record: *mut u8) {
    let len = values.len() - (BLOCK - 1) * stride;
    let ones = [_mm256_set1_epi8(1), _mm256_set1_epi16(1)];
    // Packing leaves the four-byte pieces of both halves in turn.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let mut first = 0;
    while first < len {
        // SAFETY: the groups lie within the rows, and the caller's promise about the records.
        unsafe {
            let (mut most, mut minus_least) =
                ([_mm256_setzero_ps(); BLOCK], [_mm256_setzero_ps(); BLOCK]);
            for r in 0..BLOCK {
                let from = values.as_ptr().add(r * stride + first);
                let (mut high, mut low) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from));
                for i in 1..4 {
                    let x = _mm256_loadu_ps(from.add(i * LANES));
                    high = _mm256_max_ps(high, x);
                    low = _mm256_min_ps(low, x);
                }
                most[r] = high;
                minus_least[r] = _mm256_sub_ps(_mm256_setzero_ps(), low);
            }
            let high = _mm_max_ps(largest_of_each(most), _mm_setzero_ps());
            let low = _mm_max_ps(largest_of_each(minus_least), _mm_setzero_ps());
            // As in `Span::new`.
            let scale = _mm_div_ps(_mm_add_ps(high, low), _mm_set1_ps(254.0));
            let none = _mm_cmplt_ps(scale, _mm_set1_ps(f32::MIN_POSITIVE));
            let scale = _mm_andnot_ps(none, scale);
            let inverse = _mm_andnot_ps(none, _mm_div_ps(_mm_set1_ps(1.0), scale));
            let middle = _mm_mul_ps(_mm_sub_ps(high, low), _mm_set1_ps(0.5));
            let zero = _mm_cvtps_epi32(_mm_mul_ps(middle, inverse));
            let (mut inverses, mut zeros) = ([0.0; BLOCK], [0; BLOCK]);
            _mm_storeu_ps(inverses.as_mut_ptr(), inverse);
            _mm_storeu_si128(zeros.as_mut_ptr().cast(), zero);
            let mut q = [_mm256_setzero_si256(); BLOCK];
            let mut sums = q;
            for r in 0..BLOCK {
                let from = values.as_ptr().add(r * stride + first);
                let (inverse, zero) = (_mm256_set1_ps(inverses[r]), _mm256_set1_epi32(zeros[r]));
                let rounded = |i: usize| {
                    let x = _mm256_mul_ps(_mm256_loadu_ps(from.add(i * LANES)), inverse);
                    _mm256_sub_epi32(_mm256_cvtps_epi32(x), zero)
                };
                let words = [
                    _mm256_packs_epi32(rounded(0), rounded(1)),
                    _mm256_packs_epi32(rounded(2), rounded(3)),
                ];
                let bytes = _mm256_packs_epi16(words[0], words[1]);
                q[r] = _mm256_permutevar8x32_epi32(bytes, order);
                sums[r] = _mm256_madd_epi16(_mm256_maddubs_epi16(ones[0], q[r]), ones[1]);
            }
            for (step, line) in side_by_side(q).into_iter().enumerate() {
                let to = record.add(step * 4 * BLOCK);
                _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(line));
                let later = _mm256_extracti128_si256::<1>(line);
                _mm_storeu_si128(to.add(16 * BLOCK).cast(), later);
            }
            let sums = _mm256_hadd_epi32(
                _mm256_hadd_epi32(sums[0], sums[1]),
                _mm256_hadd_epi32(sums[2], sums[3]),
            );
            write_tail(record, scale, zero, sums);
            record = record.add(RECORD * BLOCK);
        }
        first += GROUP;
    }
}

/// Writes what follows a block's integers, as [`Target::push`] does for a row. `sums` has the sums of each row's first 16
/// integers, and then those of its last 16.
///
/// # Safety
/// There is a record for four rows, which nobody else touches.
#[target_feature(enable = "avx2")]
#[inline]
pub(in super::super) unsafe fn write_tail(
    record: *mut u8,
    scale: __m128,
    zero: __m128i,
    sums: __m256i,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let half_zero = _mm_slli_epi32::<4>(zero);
        let first_sum = _mm_add_epi32(_mm256_castsi256_si128(sums), half_zero);
        let second_sum = _mm_add_epi32(_mm256_extracti128_si256::<1>(sums), half_zero);
        let sum = _mm_add_epi32(first_sum, second_sum);
        let minus = |x| _mm_sub_epi32(_mm_setzero_si128(), x);
        let tail = record.add(GROUP * BLOCK).cast::<[f32; BLOCK]>();
        _mm_storeu_ps(tail.cast(), scale);
        _mm_storeu_ps(tail.add(1).cast(), _mm_mul_ps(scale, _mm_cvtepi32_ps(sum)));
        _mm_storeu_si128(tail.add(2).cast(), minus(_mm_slli_epi32::<3>(sum)));
        _mm_storeu_si128(tail.add(3).cast(), minus(_mm_slli_epi32::<7>(first_sum)));
        let low_half = _mm_and_si128(zero, _mm_set1_epi32(0xffff));
        _mm_storeu_si128(tail.add(4).cast(), low_half);
    }
}

/// The largest lane of each of four vectors.
#[target_feature(enable = "avx2")]
#[inline]
fn largest_of_each(x: [__m256; BLOCK]) -> __m128 {
    let pair = |a, b| _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let (a, b) = (pair(x[0], x[1]), pair(x[2], x[3]));
    let four = _mm256_max_ps(
        _mm256_shuffle_ps::<0b01_00_01_00>(a, b),
        _mm256_shuffle_ps::<0b11_10_11_10>(a, b),
    );
    _mm_max_ps(
        _mm256_castps256_ps128(four),
        _mm256_extractf128_ps::<1>(four),
    )
}

/// Four integers of each row after the other: those from 4i on, and in the upper half those from 16 + 4i on.
#[target_feature(enable = "avx2")]
#[inline]
pub(in super::super) fn side_by_side(q: [__m256i; BLOCK]) -> [__m256i; 4] {
    let low = [
        _mm256_unpacklo_epi32(q[0], q[1]),
        _mm256_unpacklo_epi32(q[2], q[3]),
    ];
    let high = [
        _mm256_unpackhi_epi32(q[0], q[1]),
        _mm256_unpackhi_epi32(q[2], q[3]),
    ];
    [
        _mm256_unpacklo_epi64(low[0], low[1]),
        _mm256_unpackhi_epi64(low[0], low[1]),
        _mm256_unpacklo_epi64(high[0], high[1]),
        _mm256_unpackhi_epi64(high[0], high[1]),
    ]
}
