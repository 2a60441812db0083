//! Products with many rows: a tile's weights are unpacked once for all of them, into a panel that stays in the first cache.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::super::integers::{SHARED, Task};
use super::super::super::record::RECORD;
use super::super::super::{BLOCK, TILE};
use super::super::{INDEX, ROWS, Strides, bits_of_value, offset, weighted};
use super::{LANES, halves, no_vnni, scales_at, store, table, vnni};
use crate::cpu::quant::GROUP;

/// Steps of 32 inputs of a panel at most.
const DEPTH: usize = 24;
/// Lines of a step: four inputs of the 16 outputs of a tile.
const LINES: usize = GROUP / 4;

/// Some steps of a tile, ready to be multiplied.
struct Panel {
    /// Integers as bytes.
    lines: [[[__m256i; 2]; LINES]; DEPTH],
    scales: [[[__m256; 2]; 2]; DEPTH],
    /// Sums of the integers that share a scale.
    totals: [[[__m256i; 2]; 2]; DEPTH],
    mins: [[[__m256; 2]; 2]; DEPTH],
}

/// What a unit of work computes in. Nothing of it is read before it is written.
pub(super) struct Scratch {
    panel: Panel,
    sums: [[__m256; 2]; ROWS],
}

/// The functions that are compiled once without VNNI and once with it.
macro_rules! panels {
    ($multiply_rows:ident, $unpack:ident, $block:ident, $multiply:ident, $features:literal, $vnni:literal) => {
        /// All `rows`, at most [`ROWS`], in the tile; what each gets is the same to the bit as in a strip.
        ///
        /// # Safety
        /// As for [`super::integers`]; the rows are in blocks of four and begin with one.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $multiply_rows<
            const BITS: usize,
            const GROUPS: usize,
            const NESTED: bool,
            const MIN: bool,
        >(
            task: &Task,
            tile: usize,
            rows: Range<usize>,
        ) {
            let groups = task.weights.groups;
            let depth = if NESTED {
                DEPTH / SHARED * SHARED
            } else {
                groups.div_ceil(groups.div_ceil(DEPTH).max(1))
            };
            let mut scratch = MaybeUninit::<Scratch>::uninit();
            let scratch = scratch.as_mut_ptr();
            // SAFETY: the caller's promise; the panel's steps are written before they are read, and the sums with the first.
            unsafe {
                let panel = &raw mut (*scratch).panel;
                let sums = (&raw mut (*scratch).sums).cast::<[__m256; 2]>();
                let mut first = 0;
                while first < groups {
                    let steps = depth.min(groups - first);
                    $unpack::<BITS, GROUPS, NESTED, MIN>(task, tile, first..first + steps, panel);
                    let mut row = rows.start;
                    while row < rows.end {
                        let x = task.x.block_at(row).add(first * RECORD * BLOCK);
                        let to = sums.add(row - rows.start);
                        let going_on = first > 0;
                        match rows.end - row {
                            1 => $block::<BITS, GROUPS, MIN, 1>(panel, steps, x, to, going_on),
                            2 => $block::<BITS, GROUPS, MIN, 2>(panel, steps, x, to, going_on),
                            3 => $block::<BITS, GROUPS, MIN, 3>(panel, steps, x, to, going_on),
                            _ => $block::<BITS, GROUPS, MIN, 4>(panel, steps, x, to, going_on),
                        }
                        row += BLOCK;
                    }
                    first += steps;
                }
                for row in rows.clone() {
                    store(&task.output, row, tile, *sums.add(row - rows.start));
                }
            }
        }

        /// Fills the panel with some steps of the tile.
        #[allow(clippy::too_many_lines, reason = "one loop over the codes")]
        #[target_feature(enable = $features)]
        unsafe fn $unpack<
            const BITS: usize,
            const GROUPS: usize,
            const NESTED: bool,
            const MIN: bool,
        >(
            task: &Task,
            tile: usize,
            steps: Range<usize>,
            panel: *mut Panel,
        ) {
            let strides = Strides::of::<BITS, GROUPS, NESTED, MIN>(task.weights.groups);
            let nibble = _mm256_set1_epi8(0x0f);
            let upper = _mm256_set1_epi8(0x30);
            let quarter = _mm256_set1_epi8(0x03);
            let flip = _mm256_set1_epi8(-128);
            let table = table(task.weights.code.table, $vnni);
            let ones = _mm256_set1_epi16(1);
            let ones_8 = _mm256_set1_epi8(1);
            // SAFETY: the steps and the tile are those of the weights, and the panel has room for them.
            unsafe {
                for c in 0..2 {
                    let mut factors = [_mm256_setzero_ps(); 2];
                    for (at, step) in steps.clone().enumerate() {
                        let q = task.weights.q.as_ptr();
                        let q = q.add(tile * strides.q_tile + step * strides.q_step + c * 32);
                        let scales = task.weights.scales.as_ptr().add(tile * strides.scale_tile);
                        let scales =
                            scales.add(step * strides.scale_step + step / SHARED * strides.factors);
                        if NESTED && step.is_multiple_of(SHARED) {
                            factors[0] = halves(scales.add(c * 2 * LANES));
                            if MIN {
                                factors[1] = halves(scales.add(2 * TILE + c * 2 * LANES));
                            }
                        }
                        let scales = scales.add(strides.factors);
                        if c == 0 {
                            // The same step of the tile that comes next.
                            let ahead = q.cast::<i8>().wrapping_add(strides.q_tile);
                            for line in 0..strides.q_step / 64 {
                                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64));
                            }
                            let ahead = scales.cast::<i8>().wrapping_add(strides.scale_tile);
                            _mm_prefetch::<_MM_HINT_T0>(ahead);
                        }
                        let lines = (&raw mut (*panel).lines[at]).cast::<[__m256i; 2]>();
                        for line in 0..LINES {
                            let at = match BITS {
                                8 => line,
                                2 => line / 4,
                                _ => line / 2,
                            };
                            let mut w = _mm256_loadu_si256(q.add(at * 64).cast());
                            if BITS == 8 {
                                if !$vnni {
                                    w = _mm256_xor_si256(w, flip);
                                }
                            } else if BITS == 2 {
                                w = match line % 4 {
                                    0 => w,
                                    1 => _mm256_srli_epi16::<2>(w),
                                    2 => _mm256_srli_epi16::<4>(w),
                                    _ => _mm256_srli_epi16::<6>(w),
                                };
                                w = _mm256_and_si256(w, quarter);
                            } else {
                                if line % 2 == 1 {
                                    w = _mm256_srli_epi16::<4>(w);
                                }
                                w = _mm256_and_si256(w, nibble);
                            }
                            if BITS == INDEX {
                                w = _mm256_shuffle_epi8(table, w);
                            }
                            if BITS == 6 {
                                let four = _mm256_loadu_si256(q.add((4 + line / 4) * 64).cast());
                                let two = match line % 4 {
                                    0 => _mm256_slli_epi16::<4>(four),
                                    1 => _mm256_slli_epi16::<2>(four),
                                    2 => four,
                                    _ => _mm256_srli_epi16::<2>(four),
                                };
                                w = _mm256_or_si256(w, _mm256_and_si256(two, upper));
                            }
                            (*lines.add(line))[c] = w;
                        }
                        for part in 0..GROUPS {
                            let mut total = _mm256_setzero_si256();
                            // Eight integers of 4 bits fit into a byte, more bits into none.
                            let mut bytes = total;
                            for line in part * LINES / GROUPS..(part + 1) * LINES / GROUPS {
                                let w = (*lines.add(line))[c];
                                if BITS == 4 {
                                    bytes = _mm256_add_epi8(bytes, w);
                                    if line + 1 < LINES {
                                        continue;
                                    }
                                } else {
                                    bytes = w;
                                }
                                let pairs = if !$vnni && bits_of_value(BITS) == 8 {
                                    _mm256_maddubs_epi16(ones_8, bytes)
                                } else {
                                    _mm256_maddubs_epi16(bytes, ones_8)
                                };
                                total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
                            }
                            (*panel).totals[at][part][c] = total;
                            let from = scales.add((part * TILE + c * LANES) * strides.scale);
                            (*panel).scales[at][part][c] = scales_at::<NESTED>(from, factors[0]);
                            if MIN {
                                let from = from.add(GROUPS * TILE * strides.scale);
                                (*panel).mins[at][part][c] = scales_at::<NESTED>(from, factors[1]);
                            }
                        }
                    }
                }
            }
        }

        /// Adds what the steps of the panel give to the sums of a block of rows, or writes it there.
        #[allow(
            clippy::too_many_lines,
            reason = "one loop whose values stay in registers"
        )]
        #[target_feature(enable = $features)]
        #[inline(never)]
        unsafe fn $block<
            const BITS: usize,
            const GROUPS: usize,
            const MIN: bool,
            const R: usize,
        >(
            panel: *const Panel,
            steps: usize,
            mut record: *const u8,
            to: *mut [__m256; 2],
            going_on: bool,
        ) {
            let ones = _mm256_set1_epi16(1);
            // Sums of as many lines' products fit into 16 bits.
            let narrow_lines = match BITS {
                4 => 8,
                2 => 4,
                6 => 2,
                _ => 1,
            };
            // SAFETY: the panel has these steps, the records are those of a block, and there are sums for its rows.
            unsafe {
                if !going_on {
                    for r in 0..R {
                        *to.add(r) = [_mm256_setzero_ps(); 2];
                    }
                }
                for step in 0..steps {
                    let tail = record.add(GROUP * BLOCK).cast::<f32>();
                    let lines = (&raw const (*panel).lines[step]).cast::<[__m256i; 2]>();
                    for part in 0..GROUPS {
                        let mut dots = [[_mm256_setzero_si256(); 2]; R];
                        // Without VNNI, bytes around 128 become signed, and have no offset.
                        if !MIN && ($vnni || bits_of_value(BITS) != 8) {
                            for r in 0..R {
                                let offset = offset::<BITS, GROUPS>(tail.cast(), BLOCK, r, part);
                                dots[r] = [_mm256_set1_epi32(offset); 2];
                            }
                        }
                        let mut line = part * LINES / GROUPS;
                        while line < (part + 1) * LINES / GROUPS {
                            let mut narrow = [[_mm256_setzero_si256(); 2]; R];
                            for _ in 0..narrow_lines {
                                let w = *lines.add(line);
                                let x = record.add(line * BLOCK * 4).cast::<i32>();
                                for r in 0..R {
                                    let x = _mm256_set1_epi32(*x.add(r));
                                    for c in 0..2 {
                                        if $vnni {
                                            dots[r][c] = $multiply(dots[r][c], w[c], x);
                                            continue;
                                        }
                                        // The weight's sign goes to the activation: 128 * 127 * 2 fits into 16 bits.
                                        let pairs = if bits_of_value(BITS) == 8 {
                                            let x = _mm256_sign_epi8(x, w[c]);
                                            _mm256_maddubs_epi16(_mm256_abs_epi8(w[c]), x)
                                        } else {
                                            _mm256_maddubs_epi16(w[c], x)
                                        };
                                        narrow[r][c] = _mm256_add_epi16(narrow[r][c], pairs);
                                    }
                                    keep_order(if $vnni { &mut dots[r] } else { &mut narrow[r] });
                                }
                                line += 1;
                            }
                            if !$vnni {
                                for r in 0..R {
                                    for c in 0..2 {
                                        let wide = _mm256_madd_epi16(narrow[r][c], ones);
                                        dots[r][c] = _mm256_add_epi32(dots[r][c], wide);
                                    }
                                }
                            }
                        }
                        let (totals, scales) =
                            ((*panel).totals[step][part], (*panel).scales[step][part]);
                        for r in 0..R {
                            // Its upper 16 bits are zero, whatever those of a total are.
                            let zero = _mm256_set1_epi32(*tail.cast::<i32>().add(4 * BLOCK + r));
                            let factor = _mm256_set1_ps(*tail.add(r));
                            for c in 0..2 {
                                let more = _mm256_madd_epi16(totals[c], zero);
                                let dots = _mm256_add_epi32(dots[r][c], more);
                                let sums = &mut (*to.add(r))[c];
                                *sums = _mm256_fmadd_ps(
                                    _mm256_cvtepi32_ps(dots),
                                    _mm256_mul_ps(scales[c], factor),
                                    *sums,
                                );
                                if MIN {
                                    let weighted = weighted::<GROUPS>(tail, BLOCK, r, part);
                                    let min = (*panel).mins[step][part][c];
                                    *sums = _mm256_fmadd_ps(min, _mm256_set1_ps(weighted), *sums);
                                }
                            }
                        }
                    }
                    record = record.add(RECORD * BLOCK);
                }
            }
        }
    };
}

panels!(
    multiply_rows,
    unpack,
    block,
    no_vnni,
    "avx2,fma,f16c",
    false
);
panels!(
    multiply_rows_vnni,
    unpack_vnni,
    block_vnni,
    vnni,
    "avx2,fma,f16c,avxvnni",
    true
);

/// Has the compiler compute these sums before what follows: left to itself it computes one after the other over all lines, which
/// keeps none in a register and waits for each product.
#[target_feature(enable = "avx2")]
#[inline]
fn keep_order(sums: &mut [__m256i; 2]) {
    for sum in sums {
        // SAFETY: there is no instruction in it.
        unsafe {
            asm!(
                "/* {0} */",
                inout(ymm_reg) * sum,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}
