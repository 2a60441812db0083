//! Products with floats, with AVX2.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::super::floats::{Data, Task};
use super::super::super::{Format, TILE};
use super::super::by_rows;
use super::{LANES, store};

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

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float_strips<const KIND: u8>(
    task: &Task,
    data: *const u8,
    tiles: Range<usize>,
    rows: Range<usize>,
) {
    for tile in tiles {
        // SAFETY: the caller's promise.
        unsafe { by_rows!(float_strip::<KIND>(task, data, tile), rows) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn float_strip<const KIND: u8, const R: usize>(
    task: &Task,
    data: *const u8,
    tile: usize,
    row: usize,
) {
    let size = if KIND == F32 { 4 } else { 2 };
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    // SAFETY: all reads lie within the task's buffers, all writes within its tile and rows.
    unsafe {
        let mut data = data.add(tile * task.cols * TILE * size);
        let x = task.x.add(row * task.cols);
        for k in 0..task.cols {
            let mut w = [_mm256_setzero_ps(); 2];
            for c in 0..2 {
                let from = data.add(c * LANES * size);
                w[c] = match KIND {
                    F32 => _mm256_loadu_ps(from.cast()),
                    F16 => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                    _ => {
                        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
                    }
                };
            }
            for r in 0..R {
                let x = _mm256_set1_ps(*x.add(r * task.cols + k));
                for c in 0..2 {
                    sums[r][c] = _mm256_fmadd_ps(w[c], x, sums[r][c]);
                }
            }
            data = data.add(TILE * size);
        }
        for r in 0..R {
            store(&task.output, row + r, tile, sums[r]);
        }
    }
}
