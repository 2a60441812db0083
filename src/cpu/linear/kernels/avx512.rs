//! Kernels for AVX-512 with VNNI: a register holds 16 outputs, and a tile of up to 4 rows by 3 registers stays in registers.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]
#![allow(
    clippy::needless_range_loop,
    reason = "tiles are indexed by row and column"
)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::activations::{RECORD, Span, Target};
use super::super::floats::{self, Data};
use super::super::integers::{self, IntWeights, SHARED};
use super::super::{BLOCK, Format, Output, TILE};
use super::avx2::side_by_side;
use super::{TILES, by_code, by_rows, offset};
use crate::cpu::quant::GROUP;

/// Bytes of weights that are fetched ahead where one row reads each only once.
const AHEAD: usize = 4 << 10;

/// # Safety
/// The processor has the instructions, the buffers of the task are of the right sizes, nobody writes `x`, and nobody else
/// these tiles and rows of `y`.
pub(super) unsafe fn integers(task: &integers::Task, tiles: Range<usize>, rows: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { by_code!(task.weights.code, strips(task, tiles, rows)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn strips<const BITS: usize, const GROUPS: usize, const NESTED: bool, const MIN: bool>(
    task: &integers::Task,
    tiles: Range<usize>,
    rows: Range<usize>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if task.x.block() == 1 {
            for tile in tiles {
                strip::<BITS, GROUPS, NESTED, MIN, 1, 1, 1>(task, tile, 0, 0);
            }
            return;
        }
        for tile in tiles.clone().step_by(TILES) {
            if tiles.end - tile >= TILES {
                by_rows!(strip::<BITS, GROUPS, NESTED, MIN; 4>(task, tile, rows.start) by 3, rows);
            } else {
                for tile in tile..tiles.end {
                    by_rows!(strip::<BITS, GROUPS, NESTED, MIN; 4>(task, tile, rows.start) by 1, rows);
                }
            }
        }
    }
}

/// Rows `row` to `row + R` in the tiles `tile` to `tile + C`, of rows in blocks of `B`.
#[allow(
    clippy::too_many_lines,
    reason = "one loop whose values stay in registers"
)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
unsafe fn strip<
    const BITS: usize,
    const GROUPS: usize,
    const NESTED: bool,
    const MIN: bool,
    const B: usize,
    const R: usize,
    const C: usize,
>(
    task: &integers::Task,
    tile: usize,
    first: usize,
    row: usize,
) {
    let weights: &IntWeights = task.weights;
    let size = if NESTED { TILE } else { 2 * TILE };
    let q_step = GROUP * TILE * BITS / 8;
    let scale_step = size * (GROUPS + usize::from(MIN));
    let q_stride = weights.groups * q_step;
    let factor_bytes = (1 + usize::from(MIN)) * 2 * TILE;
    let scale_stride =
        weights.groups * scale_step + usize::from(NESTED) * weights.groups / SHARED * factor_bytes;
    let half = _mm512_set1_epi8(0x0f);
    let upper = _mm512_set1_epi8(0x30);
    let ones = _mm512_set1_epi8(1);
    let zeros = [_mm512_setzero_si512(); C];
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    let mut factors = [[_mm512_setzero_ps(); C]; 2];
    // SAFETY: all reads lie within the task's buffers, all writes within its tiles and rows.
    unsafe {
        let mut q = weights.q.as_ptr().add(tile * q_stride);
        let mut scales = weights.scales.as_ptr().add(tile * scale_stride);
        let mut record = task.x.block_at(row);
        for group in 0..weights.groups {
            if NESTED && group.is_multiple_of(SHARED) {
                for c in 0..C {
                    let from = scales.add(c * scale_stride);
                    factors[0][c] = halves(from);
                    if MIN {
                        factors[1][c] = halves(from.add(2 * TILE));
                    }
                }
                scales = scales.add(factor_bytes);
            }
            if B == 1 {
                let ahead = q.cast::<i8>().wrapping_add(AHEAD);
                for line in 0..q_step / 64 {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64));
                }
                let ahead = scales.cast::<i8>();
                let ahead = ahead.wrapping_add(AHEAD / q_step * scale_step);
                _mm_prefetch::<_MM_HINT_T0>(ahead);
            } else if row == first {
                for c in 0..C {
                    let ahead = q.cast::<i8>().wrapping_add((c + C) * q_stride);
                    for line in 0..q_step / 64 {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64));
                    }
                    let ahead = scales.cast::<i8>().wrapping_add((c + C) * scale_stride);
                    for line in 0..scale_step.div_ceil(64) {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64));
                    }
                }
            }
            let tail = record.add(GROUP * B).cast::<f32>();
            for part in 0..GROUPS {
                let mut dots = [[_mm512_setzero_si512(); C]; R];
                if !MIN {
                    for (r, dots) in dots.iter_mut().enumerate() {
                        let offset = offset::<BITS, GROUPS>(tail.cast(), B, r, part);
                        *dots = [_mm512_set1_epi32(offset); C];
                    }
                }
                // The weights' sums: bytes at first with 4 bits, which hold 8 of them.
                let mut totals = zeros;
                let steps = 8 / GROUPS;
                let mut step = part * steps;
                while step < (part + 1) * steps {
                    if BITS == 8 {
                        let mut w = zeros;
                        for c in 0..C {
                            w[c] = load(q.add(c * q_stride + step * 64));
                            totals[c] = _mm512_dpbusd_epi32(totals[c], w[c], ones);
                        }
                        multiply(&mut dots, &w, record.add(step * B * 4));
                        step += 1;
                    } else {
                        let (mut low, mut high) = (zeros, zeros);
                        for c in 0..C {
                            let both = load(q.add(c * q_stride + step / 2 * 64));
                            low[c] = _mm512_and_si512(both, half);
                            high[c] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), half);
                            if BITS == 4 {
                                totals[c] =
                                    _mm512_add_epi8(totals[c], _mm512_add_epi8(low[c], high[c]));
                                continue;
                            }
                            let both = load(q.add(c * q_stride + (4 + step / 4) * 64));
                            let (first, second) = if step.is_multiple_of(4) {
                                let second = _mm512_slli_epi16::<2>(both);
                                (_mm512_slli_epi16::<4>(both), second)
                            } else {
                                (both, _mm512_srli_epi16::<2>(both))
                            };
                            low[c] = _mm512_or_si512(low[c], _mm512_and_si512(first, upper));
                            high[c] = _mm512_or_si512(high[c], _mm512_and_si512(second, upper));
                            totals[c] = _mm512_dpbusd_epi32(totals[c], low[c], ones);
                            totals[c] = _mm512_dpbusd_epi32(totals[c], high[c], ones);
                        }
                        multiply(&mut dots, &low, record.add(step * B * 4));
                        multiply(&mut dots, &high, record.add((step + 1) * B * 4));
                        step += 2;
                    }
                }
                if BITS == 4 {
                    for c in 0..C {
                        totals[c] = _mm512_dpbusd_epi32(zeros[c], totals[c], ones);
                    }
                }
                for r in 0..R {
                    let zero = _mm512_set1_epi32(*tail.cast::<i32>().add(4 * B + r));
                    for c in 0..C {
                        dots[r][c] = _mm512_dpwssd_epi32(dots[r][c], totals[c], zero);
                    }
                }
                let mut scale = [_mm512_setzero_ps(); C];
                for c in 0..C {
                    let from = scales.add(c * scale_stride + part * size);
                    scale[c] = scales_at::<NESTED>(from, factors[0][c]);
                }
                for r in 0..R {
                    let factor = _mm512_set1_ps(*tail.add(r));
                    for c in 0..C {
                        sums[r][c] = _mm512_fmadd_ps(
                            _mm512_cvtepi32_ps(dots[r][c]),
                            _mm512_mul_ps(scale[c], factor),
                            sums[r][c],
                        );
                    }
                }
            }
            if MIN {
                let mut min = [_mm512_setzero_ps(); C];
                for c in 0..C {
                    let from = scales.add(c * scale_stride + size);
                    min[c] = scales_at::<NESTED>(from, factors[1][c]);
                }
                for r in 0..R {
                    let weighted = _mm512_set1_ps(*tail.add(B + r));
                    for c in 0..C {
                        sums[r][c] = _mm512_fmadd_ps(min[c], weighted, sums[r][c]);
                    }
                }
            }
            q = q.add(q_step);
            scales = scales.add(scale_step);
            record = record.add(RECORD * B);
        }
        for r in 0..R {
            for c in 0..C {
                store(&task.output, row + r, tile + c, sums[r][c]);
            }
        }
    }
}

/// Adds the products of four inputs of `C` tiles with those of `R` rows.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
unsafe fn multiply<const R: usize, const C: usize>(
    dots: &mut [[__m512i; C]; R],
    w: &[__m512i; C],
    x: *const u8,
) {
    for r in 0..R {
        // SAFETY: the caller passes four inputs of at least `R` rows.
        let x = _mm512_set1_epi32(unsafe { *x.cast::<i32>().add(r) });
        for c in 0..C {
            dots[r][c] = _mm512_dpbusd_epi32(dots[r][c], w[c], x);
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load(from: *const u8) -> __m512i {
    // SAFETY: the caller passes 64 readable bytes.
    unsafe { _mm512_loadu_si512(from.cast()) }
}

/// 16 numbers of half precision as f32.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn halves(from: *const u8) -> __m512 {
    // SAFETY: the caller passes 16 of them.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
}

/// 16 scales as f32, nested ones times their factors.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn scales_at<const NESTED: bool>(from: *const u8, factors: __m512) -> __m512 {
    // SAFETY: the caller passes 16 readable scales.
    unsafe {
        if NESTED {
            let bytes = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()));
            _mm512_mul_ps(_mm512_cvtepi32_ps(bytes), factors)
        } else {
            halves(from)
        }
    }
}

/// Writes the results of one row in one tile, those that exist.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store(output: &Output, row: usize, tile: usize, sums: __m512) {
    let first = tile * TILE;
    let mask = u16::MAX >> (TILE - TILE.min(output.stride - first));
    // SAFETY: the bias has whole tiles, and only what lies in the row is written.
    unsafe {
        let sums = if output.bias.is_null() {
            sums
        } else {
            _mm512_add_ps(sums, _mm512_loadu_ps(output.bias.add(first)))
        };
        _mm512_mask_storeu_ps(output.y.add(row * output.stride + first), mask, sums);
    }
}

/// # Safety
/// The processor has the instructions, and there are records for all groups, which nobody else touches.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn quantize(values: &[f32], mut target: Target) {
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
pub(super) unsafe fn quantize_block(values: &[f32], stride: usize, mut record: *mut u8) {
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
            // As in `Target::push`.
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

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// # Safety
/// As for [`integers`].
pub(super) unsafe fn floats(task: &floats::Task, tiles: Range<usize>, rows: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe {
        match (&task.weights.data, task.weights.format) {
            (Data::Full(data), _) => float_strips::<F32>(task, data.as_ptr().cast(), tiles, rows),
            (Data::Half(data), Format::Bf16) => {
                float_strips::<BF16>(task, data.as_ptr().cast(), tiles, rows);
            }
            (Data::Half(data), _) => float_strips::<F16>(task, data.as_ptr().cast(), tiles, rows),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn float_strips<const KIND: u8>(
    task: &floats::Task,
    data: *const u8,
    tiles: Range<usize>,
    rows: Range<usize>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        for tile in tiles.clone().step_by(TILES) {
            if tiles.end - tile >= TILES {
                by_rows!(float_strip::<KIND>(task, data, tile) by 3, rows);
            } else {
                for tile in tile..tiles.end {
                    by_rows!(float_strip::<KIND>(task, data, tile) by 1, rows);
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
unsafe fn float_strip<const KIND: u8, const R: usize, const C: usize>(
    task: &floats::Task,
    data: *const u8,
    tile: usize,
    row: usize,
) {
    let line = if KIND == F32 { 4 * TILE } else { 2 * TILE };
    let stride = task.cols * line;
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    // SAFETY: all reads lie within the task's buffers, all writes within its tiles and rows.
    unsafe {
        let data = data.add(tile * stride);
        let x = task.x.add(row * task.cols);
        for k in 0..task.cols {
            let mut w = [_mm512_setzero_ps(); C];
            for c in 0..C {
                let from = data.add(c * stride + k * line);
                w[c] = match KIND {
                    F32 => _mm512_loadu_ps(from.cast()),
                    F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
                    _ => {
                        let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                    }
                };
            }
            for r in 0..R {
                let x = _mm512_set1_ps(*x.add(r * task.cols + k));
                for c in 0..C {
                    sums[r][c] = _mm512_fmadd_ps(w[c], x, sums[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                store(&task.output, row + r, tile + c, sums[r][c]);
            }
        }
    }
}
