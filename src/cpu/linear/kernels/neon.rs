//! Kernels for aarch64 with dot products: a tile's 16 outputs are four registers, for up to 4 rows at once.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]
#![allow(
    clippy::needless_range_loop,
    reason = "tiles are indexed by row and column"
)]

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::super::integers::{self, SHARED};
use super::super::record::{RECORD, Span, Target};
use super::super::{Output, TILE};
use super::floats::float_kernel;
use super::{INDEX, Strides, bits_of_value, by_code, by_rows, offset, weighted};
use crate::cpu::quant::{GROUP, Table};

/// Registers of a tile.
const QUADS: usize = 4;

/// # Safety
/// The processor has the instructions, the buffers of the task are of the right sizes, nobody writes `x`, and nobody else
/// these tiles and rows of `y`.
pub(super) unsafe fn integers(task: &integers::Task, tiles: Range<usize>, rows: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { by_code!(task.weights.code, strips(task, tiles, rows)) }
}

#[target_feature(enable = "neon,dotprod")]
unsafe fn strips<const BITS: usize, const GROUPS: usize, const NESTED: bool, const MIN: bool>(
    task: &integers::Task,
    tiles: Range<usize>,
    rows: Range<usize>,
) {
    for tile in tiles {
        // SAFETY: the caller's promise.
        unsafe {
            if task.x.block() == 1 {
                strip::<BITS, GROUPS, NESTED, MIN, 1, 1>(task, tile, 0);
            } else {
                by_rows!(strip::<BITS, GROUPS, NESTED, MIN; 4>(task, tile), rows);
            }
        }
    }
}

/// Rows `row` to `row + R` in the tile, of rows in blocks of `B`.
#[allow(
    clippy::too_many_lines,
    reason = "one loop whose values stay in registers"
)]
#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn strip<
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
    // SAFETY: all reads lie within the task's buffers, all writes within its tile and rows.
    unsafe {
        let nibble = vdupq_n_u8(0x0f);
        let upper = vdupq_n_u8(0x30);
        let quarter = vdupq_n_u8(0x03);
        let flip = vdupq_n_u8(0x80);
        // As signed bytes.
        let table = task.weights.code.table.map_or([0; 16], Table::bytes);
        let table = veorq_u8(vld1q_u8(table.as_ptr()), flip);
        let mut sums = [[vdupq_n_f32(0.0); QUADS]; R];
        let mut factors = [[vdupq_n_f32(0.0); QUADS]; 2];
        let mut q = task.weights.q.as_ptr().add(tile * strides.q_tile);
        let mut scales = task.weights.scales.as_ptr().add(tile * strides.scale_tile);
        let mut record = task.x.block_at(row);
        for group in 0..groups {
            if NESTED && group.is_multiple_of(SHARED) {
                for c in 0..QUADS {
                    factors[0][c] = halves(scales.add(c * 8));
                    if MIN {
                        factors[1][c] = halves(scales.add(2 * TILE + c * 8));
                    }
                }
                scales = scales.add(strides.factors);
            }
            let tail = record.add(GROUP * B).cast::<f32>();
            for part in 0..GROUPS {
                let mut dots = [[vdupq_n_s32(0); QUADS]; R];
                // Bytes around 128 become signed, and have no offset.
                if !MIN && bits_of_value(BITS) != 8 {
                    for r in 0..R {
                        let offset = offset::<BITS, GROUPS>(tail.cast(), B, r, part);
                        dots[r] = [vdupq_n_s32(offset); QUADS];
                    }
                }
                // The weights' sums: bytes at first with 4 bits, which hold 8 of them.
                let mut bytes_of_4 = [vdupq_n_s8(0); QUADS];
                let mut totals = [vdupq_n_s32(0); QUADS];
                let steps = 8 / GROUPS;
                for step in part * steps..(part + 1) * steps {
                    let mut w = [vdupq_n_s8(0); QUADS];
                    for c in 0..QUADS {
                        let line = match BITS {
                            8 => step,
                            2 => step / 4,
                            _ => step / 2,
                        };
                        let mut bytes = vld1q_u8(q.add(line * 64 + c * 16));
                        if BITS == 8 {
                            bytes = veorq_u8(bytes, flip);
                        } else if BITS == 2 {
                            bytes = match step % 4 {
                                0 => bytes,
                                1 => vshrq_n_u8::<2>(bytes),
                                2 => vshrq_n_u8::<4>(bytes),
                                _ => vshrq_n_u8::<6>(bytes),
                            };
                            bytes = vandq_u8(bytes, quarter);
                        } else if step % 2 == 0 {
                            bytes = vandq_u8(bytes, nibble);
                        } else {
                            bytes = vshrq_n_u8::<4>(bytes);
                        }
                        if BITS == INDEX {
                            bytes = vqtbl1q_u8(table, bytes);
                        }
                        if BITS == 6 {
                            let four = vld1q_u8(q.add((4 + step / 4) * 64 + c * 16));
                            let two = match step % 4 {
                                0 => vshlq_n_u8::<4>(four),
                                1 => vshlq_n_u8::<2>(four),
                                2 => four,
                                _ => vshrq_n_u8::<2>(four),
                            };
                            bytes = vorrq_u8(bytes, vandq_u8(two, upper));
                        }
                        w[c] = vreinterpretq_s8_u8(bytes);
                        if BITS == 4 {
                            bytes_of_4[c] = vaddq_s8(bytes_of_4[c], w[c]);
                        } else {
                            totals[c] = dot(totals[c], w[c], vdupq_n_s8(1));
                        }
                    }
                    let x = record.add(step * B * 4).cast::<i32>();
                    for r in 0..R {
                        let x = vreinterpretq_s8_s32(vld1q_dup_s32(x.add(r)));
                        for c in 0..QUADS {
                            dots[r][c] = dot(dots[r][c], w[c], x);
                        }
                    }
                }
                for c in 0..QUADS {
                    if BITS == 4 {
                        totals[c] = dot(totals[c], bytes_of_4[c], vdupq_n_s8(1));
                    }
                    for r in 0..R {
                        let zero = *tail.add(4 * B + r).cast::<i16>();
                        dots[r][c] = vmlaq_n_s32(dots[r][c], totals[c], i32::from(zero));
                    }
                }
                for c in 0..QUADS {
                    let from = scales.add((part * TILE + c * 4) * strides.scale);
                    let scale = scales_at::<NESTED>(from, factors[0][c]);
                    for r in 0..R {
                        let factor = vmulq_n_f32(scale, *tail.add(r));
                        sums[r][c] = vfmaq_f32(sums[r][c], vcvtq_f32_s32(dots[r][c]), factor);
                    }
                }
                if MIN {
                    for c in 0..QUADS {
                        let from = scales.add(((GROUPS + part) * TILE + c * 4) * strides.scale);
                        let min = scales_at::<NESTED>(from, factors[1][c]);
                        for r in 0..R {
                            let weighted = weighted::<GROUPS>(tail, B, r, part);
                            sums[r][c] = vfmaq_n_f32(sums[r][c], min, weighted);
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

/// Adds four products of signed bytes to each sum. The intrinsic for it is not stable.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes registers only.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sums, in(vreg) w, in(vreg) x, options(pure, nomem, nostack));
    }
    sums
}

/// Four halves as f32. The intrinsic for it is not stable.
#[target_feature(enable = "neon")]
#[inline]
fn from_half(halves: uint16x4_t) -> float32x4_t {
    let widened;
    // SAFETY: the instruction reads and writes registers only.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) widened, in(vreg) halves, options(pure, nomem, nostack));
    }
    widened
}

/// 4 numbers of half precision as f32.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn halves(from: *const u8) -> float32x4_t {
    // SAFETY: the caller passes 4 of them.
    from_half(unsafe { vld1_u16(from.cast()) })
}

/// 4 scales as f32, nested ones times their factors.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn scales_at<const NESTED: bool>(from: *const u8, factors: float32x4_t) -> float32x4_t {
    // SAFETY: the caller passes 4 readable scales.
    unsafe {
        if NESTED {
            let bytes = vreinterpret_s8_s32(vdup_n_s32(from.cast::<i32>().read_unaligned()));
            let numbers = vmovl_s16(vget_low_s16(vmovl_s8(bytes)));
            vmulq_f32(vcvtq_f32_s32(numbers), factors)
        } else {
            halves(from)
        }
    }
}

/// Writes the results of one row in one tile, those that exist.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn store(output: &Output, row: usize, tile: usize, sums: [float32x4_t; QUADS]) {
    let mut values = [0.0; TILE];
    // SAFETY: the array has 16 values; the caller's promise about the output.
    unsafe {
        for c in 0..QUADS {
            vst1q_f32(values.as_mut_ptr().add(4 * c), sums[c]);
        }
        super::store(output, row, tile, values);
    }
}

/// # Safety
/// There are records for all groups, which nobody else touches.
#[target_feature(enable = "neon")]
pub(super) unsafe fn quantize(values: &[f32], mut target: Target) {
    for group in values.chunks(GROUP) {
        let mut full = [0.0; GROUP];
        full[..group.len()].copy_from_slice(group);
        let mut q = [0; GROUP];
        // SAFETY: the arrays have 32 values; the caller's promise about the target.
        unsafe {
            let (mut largest, mut minus_least) = (vdupq_n_f32(0.0), vdupq_n_f32(0.0));
            for i in 0..8 {
                let x = vld1q_f32(full.as_ptr().add(4 * i));
                largest = vmaxnmq_f32(largest, x);
                minus_least = vmaxnmq_f32(minus_least, vnegq_f32(x));
            }
            let span = Span::new(vmaxnmvq_f32(largest), vmaxnmvq_f32(minus_least));
            let zero = vdupq_n_s32(span.zero);
            let mut sums = [vdupq_n_s32(0); 2];
            for i in 0..4 {
                let at = full.as_ptr().add(8 * i);
                let low = vsubq_s32(
                    vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(at), span.inverse)),
                    zero,
                );
                let high = vsubq_s32(
                    vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(at.add(4)), span.inverse)),
                    zero,
                );
                let words = vcombine_s16(vmovn_s32(low), vmovn_s32(high));
                let bytes = vqmovn_s16(words);
                vst1_s8(q.as_mut_ptr().add(8 * i), bytes);
                sums[i / 2] = vpadalq_s16(sums[i / 2], vmovl_s8(bytes));
            }
            let first_sum = vaddvq_s32(sums[0]);
            let sum = first_sum + vaddvq_s32(sums[1]);
            target.push(&q, span, sum, first_sum);
        }
    }
}

float_kernel! {
    features: "neon",
    vector: float32x4_t, lanes: 4, tiles at once: 1,
    zero: vdupq_n_f32(0.0),
    broadcast: |x| vdupq_n_f32(x),
    load f32: |from: *const u8| vld1q_f32(from.cast()),
    load f16: |from: *const u8| halves(from),
    load bf16: |from: *const u8| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))),
    multiply_add: |w, x, sum| vfmaq_f32(sum, w, x),
    store: store,
}
