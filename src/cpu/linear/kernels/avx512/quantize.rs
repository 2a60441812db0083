//! Rows to integers with AVX-512.

use std::arch::x86_64::*;

use super::super::super::record::{RECORD, Span, Target};
use super::super::super::{BLOCK, TILE};
use super::super::avx2::{side_by_side, write_tail};
use crate::cpu::quant::GROUP;

/// # Safety
/// The processor has the instructions, and there are records for all groups, which nobody else touches.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) unsafe fn quantize(values: &[f32], mut target: Target) {
    for group in values.chunks(GROUP) {
        let mask = u32::MAX >> (GROUP - group.len());
        let mut q = [0; GROUP];
        // SAFETY: only what is in the group is read; the caller's promise.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask as u16, group.as_ptr());
            let high =
                _mm512_maskz_loadu_ps((mask >> 16) as u16, group.as_ptr().wrapping_add(TILE));
            let most = _mm512_max_ps(low, high);
            let minus_least = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_min_ps(low, high));
            // Both are reduced at once, each in its half.
            let both = _mm512_max_ps(
                _mm512_shuffle_f32x4::<0b01_00_01_00>(most, minus_least),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(most, minus_least),
            );
            let both = _mm512_max_ps(both, _mm512_shuffle_f32x4::<0b10_11_00_01>(both, both));
            let both = _mm512_max_ps(both, _mm512_permute_ps::<0b01_00_11_10>(both));
            let both = _mm512_max_ps(both, _mm512_permute_ps::<0b10_11_00_01>(both));
            let span = Span::new(
                _mm512_cvtss_f32(both),
                _mm_cvtss_f32(_mm512_extractf32x4_ps::<2>(both)),
            );
            let inverse = _mm512_set1_ps(span.inverse);
            let zero = _mm512_set1_epi32(span.zero);
            let rounded = |x| _mm512_sub_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)), zero);
            let low = _mm512_cvtsepi32_epi8(rounded(low));
            let high = _mm512_cvtsepi32_epi8(rounded(high));
            _mm_storeu_si128(q.as_mut_ptr().cast(), low);
            _mm_storeu_si128(q.as_mut_ptr().add(16).cast(), high);
            let first_sum = sum(low);
            target.push(&q, span, first_sum + sum(high), first_sum);
        }
    }
}

/// The same as [`quantize`] for the four rows of a block at once, whose lengths are whole groups.
///
/// # Safety
/// As for [`quantize`]; `values` ends with the last of four rows `stride` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in super::super) unsafe fn quantize_block(values: &[f32], stride: usize, mut record: *mut u8) {
    let len = values.len() - (BLOCK - 1) * stride;
    let ones = _mm256_set1_epi8(1);
    let mut first = 0;
    while first < len {
        let mut rows = [[_mm512_setzero_ps(); 2]; BLOCK];
        // SAFETY: the groups lie within the rows, and the caller's promise about the records.
        unsafe {
            for r in 0..BLOCK {
                let from = values.as_ptr().add(r * stride + first);
                rows[r] = [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(TILE))];
            }
            let (scale, inverse, zero) = spans(&rows);
            let (inverses, zeros) = (
                _mm512_broadcast_f32x4(inverse),
                _mm512_broadcast_i32x4(zero),
            );
            let lines = side_by_side([
                round(
                    rows[0],
                    _mm512_permute_ps::<0b00_00_00_00>(inverses),
                    _mm512_shuffle_epi32::<0b00_00_00_00>(zeros),
                ),
                round(
                    rows[1],
                    _mm512_permute_ps::<0b01_01_01_01>(inverses),
                    _mm512_shuffle_epi32::<0b01_01_01_01>(zeros),
                ),
                round(
                    rows[2],
                    _mm512_permute_ps::<0b10_10_10_10>(inverses),
                    _mm512_shuffle_epi32::<0b10_10_10_10>(zeros),
                ),
                round(
                    rows[3],
                    _mm512_permute_ps::<0b11_11_11_11>(inverses),
                    _mm512_shuffle_epi32::<0b11_11_11_11>(zeros),
                ),
            ]);
            let mut sums = _mm256_setzero_si256();
            for step in 0..lines.len() {
                let line = lines[step];
                sums = _mm256_dpbusd_epi32(sums, ones, line);
                let to = record.add(step * 4 * BLOCK);
                let later = _mm256_extracti128_si256::<1>(line);
                _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(line));
                _mm_storeu_si128(to.add(16 * BLOCK).cast(), later);
            }
            write_tail(record, scale, zero, sums);
            record = record.add(RECORD * BLOCK);
        }
        first += GROUP;
    }
}

/// What [`Span::new`] gives for a group of each of four rows: scale, inverse and zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn spans(rows: &[[__m512; 2]; BLOCK]) -> (__m128, __m128, __m128i) {
    let mut ends = [_mm512_setzero_ps(); BLOCK];
    for r in 0..BLOCK {
        let [low, high] = rows[r];
        let most = _mm512_max_ps(low, high);
        let minus_least = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_min_ps(low, high));
        ends[r] = _mm512_max_ps(
            _mm512_shuffle_f32x4::<0b01_00_01_00>(most, minus_least),
            _mm512_shuffle_f32x4::<0b11_10_11_10>(most, minus_least),
        );
    }
    let pair = |a, b| {
        _mm512_max_ps(
            _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
        )
    };
    let (a, b) = (pair(ends[0], ends[1]), pair(ends[2], ends[3]));
    let four = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let four = _mm512_max_ps(four, _mm512_permute_ps::<0b01_00_11_10>(four));
    // The largest of each row, then the negative of its least: where they have ended up.
    let places = _mm512_setr_epi32(0, 8, 1, 9, 4, 12, 5, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    let four = _mm512_permutexvar_ps(places, four);
    let high = _mm_max_ps(_mm512_castps512_ps128(four), _mm_setzero_ps());
    let low = _mm_max_ps(_mm512_extractf32x4_ps::<1>(four), _mm_setzero_ps());
    let scale = _mm_div_ps(_mm_add_ps(high, low), _mm_set1_ps(254.0));
    let some = !_mm_cmp_ps_mask::<_CMP_LT_OQ>(scale, _mm_set1_ps(f32::MIN_POSITIVE));
    let scale = _mm_maskz_mov_ps(some, scale);
    let inverse = _mm_maskz_div_ps(some, _mm_set1_ps(1.0), scale);
    let middle = _mm_mul_ps(_mm_sub_ps(high, low), _mm_set1_ps(0.5));
    (scale, inverse, _mm_cvtps_epi32(_mm_mul_ps(middle, inverse)))
}

/// A group as integers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn round([low, high]: [__m512; 2], inverse: __m512, zero: __m512i) -> __m256i {
    let rounded = |x| _mm512_sub_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)), zero);
    _mm256_set_m128i(
        _mm512_cvtsepi32_epi8(rounded(high)),
        _mm512_cvtsepi32_epi8(rounded(low)),
    )
}

/// The sum of 16 signed bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn sum(bytes: __m128i) -> i32 {
    let shifted = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
    let sums = _mm_sad_epu8(shifted, _mm_setzero_si128());
    let sums = _mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums));
    _mm_cvtsi128_si32(sums) - 16 * 128
}
