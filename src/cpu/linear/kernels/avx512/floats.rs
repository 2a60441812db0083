//! Products with floats, with AVX-512.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::super::floats::{Data, Task};
use super::super::super::{Format, TILE};
use super::super::{TILES, by_rows};
use super::store;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// # Safety
/// As for [`integers`].
pub(in super::super) unsafe fn floats(task: &Task, tiles: Range<usize>, rows: Range<usize>) {
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
    task: &Task,
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
    task: &Task,
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
