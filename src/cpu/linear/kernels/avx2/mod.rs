//! Kernels for AVX2, with or without 256-bit VNNI: a tile's 16 outputs are two registers, for up to 4 rows at once.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]
#![allow(
    clippy::needless_range_loop,
    reason = "tiles are indexed by row and column"
)]

mod floats;
mod panel;
mod quantize;

pub(super) use floats::floats;
pub(super) use quantize::{quantize, quantize_block, side_by_side, write_tail};

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::integers::{self, SHARED};
use super::super::record::RECORD;
use super::super::{BLOCK, Output, TILE};
use super::{INDEX, Strides, bits_of_value, by_code, by_rows, offset, weighted};
use crate::cpu::quant::{GROUP, Table};

/// Outputs in a register.
const LANES: usize = 8;

/// # Safety
/// The processor has the instructions, the buffers of the task are of the right sizes, nobody writes `x`, and nobody else
/// these tiles and rows of `y`.
pub(super) unsafe fn integers(task: &integers::Task, tiles: Range<usize>, rows: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { by_code!(task.weights.code, strips(task, tiles, rows)) }
}

/// The same with VNNI.
///
/// # Safety
/// As for [`integers`].
pub(super) unsafe fn integers_vnni(task: &integers::Task, tiles: Range<usize>, rows: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { by_code!(task.weights.code, strips_vnni(task, tiles, rows)) }
}

/// The functions that are compiled once without VNNI and once with it.
macro_rules! strips {
    ($strips:ident, $strip:ident, $multiply_rows:ident, $multiply:ident, $features:literal, $vnni:literal) => {
        #[target_feature(enable = $features)]
        unsafe fn $strips<
            const BITS: usize,
            const GROUPS: usize,
            const NESTED: bool,
            const MIN: bool,
        >(
            task: &integers::Task,
            tiles: Range<usize>,
            rows: Range<usize>,
        ) {
            for tile in tiles {
                // SAFETY: the caller's promise.
                unsafe {
                    if task.x.block() == 1 {
                        $strip::<BITS, GROUPS, NESTED, MIN, 1, 1>(task, tile, 0);
                    } else if rows.len() > BLOCK {
                        let rows = rows.clone();
                        panel::$multiply_rows::<BITS, GROUPS, NESTED, MIN>(task, tile, rows);
                    } else {
                        by_rows!($strip::<BITS, GROUPS, NESTED, MIN; 4>(task, tile), rows);
                    }
                }
            }
        }

        /// Rows `row` to `row + R` in the tile, of rows in blocks of `B`.
        #[allow(clippy::too_many_lines, reason = "one loop whose values stay in registers")]
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn $strip<
            const BITS: usize,
            const GROUPS: usize,
            const NESTED: bool,
            const MIN: bool,
            const B: usize,
            const R: usize,
        >(
            task: &integers::Task,
            tile: usize,
            row: usize,
        ) {
            let groups = task.weights.groups;
            let strides = Strides::of::<BITS, GROUPS, NESTED, MIN>(groups);
            let nibble = _mm256_set1_epi8(0x0f);
            let upper = _mm256_set1_epi8(0x30);
            let quarter = _mm256_set1_epi8(0x03);
            let flip = _mm256_set1_epi8(-128);
            let table = table(task.weights.code.table, $vnni);
            let ones = _mm256_set1_epi16(1);
            let ones_8 = _mm256_set1_epi8(1);
            let mut sums = [[_mm256_setzero_ps(); 2]; R];
            let mut factors = [[_mm256_setzero_ps(); 2]; 2];
            // SAFETY: all reads lie within the task's buffers, all writes within its tile and rows.
            unsafe {
                let mut q = task.weights.q.as_ptr().add(tile * strides.q_tile);
                let mut scales = task.weights.scales.as_ptr().add(tile * strides.scale_tile);
                let mut record = task.x.block_at(row);
                for group in 0..groups {
                    if NESTED && group.is_multiple_of(SHARED) {
                        for c in 0..2 {
                            factors[0][c] = halves(scales.add(c * 2 * LANES));
                            if MIN {
                                factors[1][c] = halves(scales.add(2 * TILE + c * 2 * LANES));
                            }
                        }
                        scales = scales.add(strides.factors);
                    }
                    let tail = record.add(GROUP * B).cast::<f32>();
                    for part in 0..GROUPS {
                        let mut dots = [[_mm256_setzero_si256(); 2]; R];
                        // Without VNNI, bytes around 128 become signed, and have no offset.
                        if !MIN && ($vnni || bits_of_value(BITS) != 8) {
                            for r in 0..R {
                                let offset = offset::<BITS, GROUPS>(tail.cast(), B, r, part);
                                dots[r] = [_mm256_set1_epi32(offset); 2];
                            }
                        }
                        // The weights' sums: bytes at first with 4 bits, which hold 8 of them.
                        let mut totals = [_mm256_setzero_si256(); 2];
                        if BITS == 4 {
                            // Sums of 8 products of 4 and 8 bits fit into 16 bits.
                            let mut narrow = [[_mm256_setzero_si256(); 2]; R];
                            for pair in 0..4 {
                                let both = [
                                    _mm256_loadu_si256(q.add(pair * 64).cast()),
                                    _mm256_loadu_si256(q.add(pair * 64 + 32).cast()),
                                ];
                                for high in 0..2 {
                                    let mut w = both;
                                    for c in 0..2 {
                                        if high == 1 {
                                            w[c] = _mm256_srli_epi16::<4>(w[c]);
                                        }
                                        w[c] = _mm256_and_si256(w[c], nibble);
                                        totals[c] = _mm256_add_epi8(totals[c], w[c]);
                                    }
                                    let x = record.add((2 * pair + high) * B * 4).cast::<i32>();
                                    for r in 0..R {
                                        let x = _mm256_set1_epi32(*x.add(r));
                                        for c in 0..2 {
                                            if $vnni {
                                                dots[r][c] = $multiply(dots[r][c], w[c], x);
                                            } else {
                                                narrow[r][c] = _mm256_add_epi16(
                                                    narrow[r][c],
                                                    _mm256_maddubs_epi16(w[c], x),
                                                );
                                            }
                                        }
                                    }
                                }
                            }
                            for c in 0..2 {
                                totals[c] = _mm256_maddubs_epi16(totals[c], ones_8);
                                totals[c] = _mm256_madd_epi16(totals[c], ones);
                            }
                            if !$vnni {
                                for r in 0..R {
                                    for c in 0..2 {
                                        let wide = _mm256_madd_epi16(narrow[r][c], ones);
                                        dots[r][c] = _mm256_add_epi32(dots[r][c], wide);
                                    }
                                }
                            }
                        } else {
                            let steps = 8 / GROUPS;
                            for step in part * steps..(part + 1) * steps {
                                let line = match BITS {
                                    8 => step,
                                    2 => step / 4,
                                    _ => step / 2,
                                };
                                let mut w = [
                                    _mm256_loadu_si256(q.add(line * 64).cast()),
                                    _mm256_loadu_si256(q.add(line * 64 + 32).cast()),
                                ];
                                for c in 0..2 {
                                    if BITS == 2 {
                                        w[c] = match step % 4 {
                                            0 => w[c],
                                            1 => _mm256_srli_epi16::<2>(w[c]),
                                            2 => _mm256_srli_epi16::<4>(w[c]),
                                            _ => _mm256_srli_epi16::<6>(w[c]),
                                        };
                                        w[c] = _mm256_and_si256(w[c], quarter);
                                    } else if BITS == INDEX {
                                        if step % 2 == 1 {
                                            w[c] = _mm256_srli_epi16::<4>(w[c]);
                                        }
                                        w[c] = _mm256_and_si256(w[c], nibble);
                                        w[c] = _mm256_shuffle_epi8(table, w[c]);
                                    } else if BITS == 6 {
                                        if step % 2 == 1 {
                                            w[c] = _mm256_srli_epi16::<4>(w[c]);
                                        }
                                        let line = 4 + step / 4;
                                        let from = q.add(line * 64 + c * 32);
                                        let four = _mm256_loadu_si256(from.cast());
                                        let two = match step % 4 {
                                            0 => _mm256_slli_epi16::<4>(four),
                                            1 => _mm256_slli_epi16::<2>(four),
                                            2 => four,
                                            _ => _mm256_srli_epi16::<2>(four),
                                        };
                                        w[c] = _mm256_or_si256(
                                            _mm256_and_si256(w[c], nibble),
                                            _mm256_and_si256(two, upper),
                                        );
                                    } else if !$vnni {
                                        w[c] = _mm256_xor_si256(w[c], flip);
                                    }
                                    let pairs = if !$vnni && bits_of_value(BITS) == 8 {
                                        _mm256_maddubs_epi16(ones_8, w[c])
                                    } else {
                                        _mm256_maddubs_epi16(w[c], ones_8)
                                    };
                                    let wide = _mm256_madd_epi16(pairs, ones);
                                    totals[c] = _mm256_add_epi32(totals[c], wide);
                                }
                                let x = record.add(step * B * 4).cast::<i32>();
                                for r in 0..R {
                                    let x = _mm256_set1_epi32(*x.add(r));
                                    for c in 0..2 {
                                        if $vnni {
                                            dots[r][c] = $multiply(dots[r][c], w[c], x);
                                            continue;
                                        }
                                        // The weight's sign goes to the activation: 128 * 127 * 2 fits into 16 bits.
                                        let pairs = if bits_of_value(BITS) != 8 {
                                            _mm256_maddubs_epi16(w[c], x)
                                        } else {
                                            let x = _mm256_sign_epi8(x, w[c]);
                                            _mm256_maddubs_epi16(_mm256_abs_epi8(w[c]), x)
                                        };
                                        let wide = _mm256_madd_epi16(pairs, ones);
                                        dots[r][c] = _mm256_add_epi32(dots[r][c], wide);
                                    }
                                }
                            }
                        }
                        for r in 0..R {
                            // Its upper 16 bits are zero, whatever those of a total are.
                            let zero = _mm256_set1_epi32(*tail.cast::<i32>().add(4 * B + r));
                            for c in 0..2 {
                                let more = _mm256_madd_epi16(totals[c], zero);
                                dots[r][c] = _mm256_add_epi32(dots[r][c], more);
                            }
                        }
                        for c in 0..2 {
                            let from = scales.add((part * TILE + c * LANES) * strides.scale);
                            let scale = scales_at::<NESTED>(from, factors[0][c]);
                            for r in 0..R {
                                sums[r][c] = _mm256_fmadd_ps(
                                    _mm256_cvtepi32_ps(dots[r][c]),
                                    _mm256_mul_ps(scale, _mm256_set1_ps(*tail.add(r))),
                                    sums[r][c],
                                );
                            }
                        }
                        if MIN {
                            for c in 0..2 {
                                let at = ((GROUPS + part) * TILE + c * LANES) * strides.scale;
                                let min = scales_at::<NESTED>(scales.add(at), factors[1][c]);
                                for r in 0..R {
                                    let weighted = weighted::<GROUPS>(tail, B, r, part);
                                    let weighted = _mm256_set1_ps(weighted);
                                    sums[r][c] = _mm256_fmadd_ps(min, weighted, sums[r][c]);
                                }
                            }
                        }
                    }
                    q = q.add(strides.q_step);
                    scales = scales.add(strides.scale_step);
                    record = record.add(RECORD * B);
                }
                for r in 0..R {
                    store(&task.output, row + r, tile, sums[r]);
                }
            }
        }
    };
}

strips!(
    strips,
    strip,
    multiply_rows,
    no_vnni,
    "avx2,fma,f16c",
    false
);
strips!(
    strips_vnni,
    strip_vnni,
    multiply_rows_vnni,
    vnni,
    "avx2,fma,f16c,avxvnni",
    true
);

#[target_feature(enable = "avx2")]
#[inline]
fn no_vnni(dots: __m256i, _: __m256i, _: __m256i) -> __m256i {
    dots
}

#[target_feature(enable = "avx2,avxvnni")]
#[inline]
fn vnni(dots: __m256i, w: __m256i, x: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(dots, w, x)
}

/// The table that integers are indices into, in both halves: bytes around 128, or signed ones without VNNI.
#[target_feature(enable = "avx2")]
#[inline]
fn table(table: Option<Table>, vnni: bool) -> __m256i {
    let bytes = table.map_or([0; 16], Table::bytes);
    let bytes = bytes.map(|byte| if vnni { byte } else { byte ^ 0x80 });
    // SAFETY: the array has 16 bytes.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// 8 numbers of half precision as f32.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn halves(from: *const u8) -> __m256 {
    // SAFETY: the caller passes 8 of them.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
}

/// 8 scales as f32, nested ones times their factors.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn scales_at<const NESTED: bool>(from: *const u8, factors: __m256) -> __m256 {
    // SAFETY: the caller passes 8 readable scales.
    unsafe {
        if NESTED {
            let bytes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()));
            _mm256_mul_ps(_mm256_cvtepi32_ps(bytes), factors)
        } else {
            halves(from)
        }
    }
}

/// Writes the results of one row in one tile, those that exist.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn store(output: &Output, row: usize, tile: usize, sums: [__m256; 2]) {
    let mut values = [0.0; TILE];
    // SAFETY: the array has 16 values; the caller's promise about the output.
    unsafe {
        _mm256_storeu_ps(values.as_mut_ptr(), sums[0]);
        _mm256_storeu_ps(values.as_mut_ptr().add(LANES), sums[1]);
        super::store(output, row, tile, values);
    }
}
