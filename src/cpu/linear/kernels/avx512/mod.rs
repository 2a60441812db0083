//! Kernels for AVX-512 with VNNI: a register holds 16 outputs, and a tile of up to 4 rows by 3 registers stays in registers.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]
#![allow(
    clippy::needless_range_loop,
    reason = "tiles are indexed by row and column"
)]

mod floats;
mod quantize;

pub(super) use floats::floats;
pub(super) use quantize::{quantize, quantize_block};

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::integers::{self, IntWeights, SHARED};
use super::super::record::RECORD;
use super::super::{Output, TILE};
use super::{INDEX, Strides, TILES, by_code, by_rows, offset, weighted};
use crate::cpu::quant::{GROUP, Table};

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
    let strides = Strides::of::<BITS, GROUPS, NESTED, MIN>(weights.groups);
    let half = _mm512_set1_epi8(0x0f);
    let quarter = _mm512_set1_epi8(0x03);
    let table = table(weights);
    let upper = _mm512_set1_epi8(0x30);
    let ones = _mm512_set1_epi8(1);
    let zeros = [_mm512_setzero_si512(); C];
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    let mut factors = [[_mm512_setzero_ps(); C]; 2];
    // SAFETY: all reads lie within the task's buffers, all writes within its tiles and rows.
    unsafe {
        let mut q = weights.q.as_ptr().add(tile * strides.q_tile);
        let mut scales = weights.scales.as_ptr().add(tile * strides.scale_tile);
        let mut record = task.x.block_at(row);
        for group in 0..weights.groups {
            if NESTED && group.is_multiple_of(SHARED) {
                for c in 0..C {
                    let from = scales.add(c * strides.scale_tile);
                    factors[0][c] = halves(from);
                    if MIN {
                        factors[1][c] = halves(from.add(2 * TILE));
                    }
                }
                scales = scales.add(strides.factors);
            }
            if B == 1 {
                let ahead = q.cast::<i8>().wrapping_add(AHEAD);
                for line in 0..strides.q_step / 64 {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64));
                }
                let ahead = scales.cast::<i8>();
                let ahead = ahead.wrapping_add(AHEAD / strides.q_step * strides.scale_step);
                _mm_prefetch::<_MM_HINT_T0>(ahead);
            } else if row == first {
                for c in 0..C {
                    let ahead = q.cast::<i8>().wrapping_add((c + C) * strides.q_tile);
                    for line in 0..strides.q_step / 64 {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64));
                    }
                    let ahead = scales
                        .cast::<i8>()
                        .wrapping_add((c + C) * strides.scale_tile);
                    for line in 0..strides.scale_step.div_ceil(64) {
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
                // The weights' sums: bytes at first with 2 and 4 bits, which hold 8 of them.
                let mut totals = zeros;
                let steps = 8 / GROUPS;
                let mut step = part * steps;
                while step < (part + 1) * steps {
                    if BITS == 8 {
                        let mut w = zeros;
                        for c in 0..C {
                            w[c] = load(q.add(c * strides.q_tile + step * 64));
                            totals[c] = _mm512_dpbusd_epi32(totals[c], w[c], ones);
                        }
                        multiply(&mut dots, &w, record.add(step * B * 4));
                        step += 1;
                    } else {
                        let (mut low, mut high) = (zeros, zeros);
                        for c in 0..C {
                            if BITS == 2 {
                                let four = load(q.add(c * strides.q_tile + step / 4 * 64));
                                let (first, second) = if step.is_multiple_of(4) {
                                    (four, _mm512_srli_epi16::<2>(four))
                                } else {
                                    (_mm512_srli_epi16::<4>(four), _mm512_srli_epi16::<6>(four))
                                };
                                low[c] = _mm512_and_si512(first, quarter);
                                high[c] = _mm512_and_si512(second, quarter);
                                totals[c] =
                                    _mm512_add_epi8(totals[c], _mm512_add_epi8(low[c], high[c]));
                                continue;
                            }
                            let both = load(q.add(c * strides.q_tile + step / 2 * 64));
                            low[c] = _mm512_and_si512(both, half);
                            high[c] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), half);
                            if BITS == 4 {
                                totals[c] =
                                    _mm512_add_epi8(totals[c], _mm512_add_epi8(low[c], high[c]));
                                continue;
                            }
                            if BITS == INDEX {
                                low[c] = _mm512_shuffle_epi8(table, low[c]);
                                high[c] = _mm512_shuffle_epi8(table, high[c]);
                            } else {
                                let both = load(q.add(c * strides.q_tile + (4 + step / 4) * 64));
                                let (first, second) = if step.is_multiple_of(4) {
                                    let second = _mm512_slli_epi16::<2>(both);
                                    (_mm512_slli_epi16::<4>(both), second)
                                } else {
                                    (both, _mm512_srli_epi16::<2>(both))
                                };
                                low[c] = _mm512_or_si512(low[c], _mm512_and_si512(first, upper));
                                high[c] = _mm512_or_si512(high[c], _mm512_and_si512(second, upper));
                            }
                            totals[c] = _mm512_dpbusd_epi32(totals[c], low[c], ones);
                            totals[c] = _mm512_dpbusd_epi32(totals[c], high[c], ones);
                        }
                        multiply(&mut dots, &low, record.add(step * B * 4));
                        multiply(&mut dots, &high, record.add((step + 1) * B * 4));
                        step += 2;
                    }
                }
                if BITS == 4 || BITS == 2 {
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
                    let from = scales.add(c * strides.scale_tile + part * TILE * strides.scale);
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
                if MIN {
                    let mut min = [_mm512_setzero_ps(); C];
                    for c in 0..C {
                        let at = (GROUPS + part) * TILE * strides.scale;
                        let from = scales.add(c * strides.scale_tile + at);
                        min[c] = scales_at::<NESTED>(from, factors[1][c]);
                    }
                    for r in 0..R {
                        let weighted = _mm512_set1_ps(weighted::<GROUPS>(tail, B, r, part));
                        for c in 0..C {
                            sums[r][c] = _mm512_fmadd_ps(min[c], weighted, sums[r][c]);
                        }
                    }
                }
            }
            q = q.add(strides.q_step);
            scales = scales.add(strides.scale_step);
            record = record.add(RECORD * B);
        }
        for r in 0..R {
            for c in 0..C {
                store(&task.output, row + r, tile + c, [sums[r][c]]);
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

/// The table that integers are indices into, in each quarter.
#[target_feature(enable = "avx512f")]
#[inline]
fn table(weights: &IntWeights) -> __m512i {
    let bytes = weights.code.table.map_or([0; 16], Table::bytes);
    // SAFETY: the array has 16 bytes.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
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
unsafe fn store(output: &Output, row: usize, tile: usize, [sums]: [__m512; 1]) {
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
