//! The inner loops, one file for each instruction set, and how a team shares a multiplication.

#![allow(
    clippy::cast_ptr_alignment,
    reason = "packed weights and records are aligned"
)]

#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::activations::Target;
use super::{BLOCK, Output, TILE, floats, integers};
use crate::cpu::isa::Isa;
use crate::cpu::pool::Team;
use std::ops::Range;

/// Tiles of a unit of work with many rows.
const TILES: usize = 3;
/// Rows of a unit of work.
const ROWS: usize = 64;
/// Bytes of weights of a unit of work with one row: enough to hide what taking it costs.
const BYTES: usize = 24 << 10;

/// Multiplies rows of integers on all threads of the team, and waits for all.
///
/// # Safety
/// The instruction set must be there; the buffers of the task are of the right sizes, nobody writes `x`, and nobody else touches
/// `y`.
pub(super) unsafe fn integers(isa: Isa, team: &Team, task: &integers::Task) {
    let weights = task.weights;
    let tile_bytes = weights.groups * (weights.group_bytes() + weights.scale_bytes());
    share(
        team,
        weights.tiles,
        task.x.rows(),
        tile_bytes,
        |tiles, rows| {
            // SAFETY: the caller's promise.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => avx512::integers(task, tiles, rows),
                    _ => portable::integers(task, tiles, rows),
                }
            }
        },
    );
}

/// Multiplies rows of floats on all threads of the team, and waits for all.
///
/// # Safety
/// As for [`integers`].
pub(super) unsafe fn floats(isa: Isa, team: &Team, task: &floats::Task) {
    let weights = task.weights;
    share(
        team,
        weights.tiles,
        task.rows,
        weights.bytes() / weights.tiles.max(1),
        |tiles, rows| {
            // SAFETY: the caller's promise.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => avx512::floats(task, tiles, rows),
                    _ => portable::floats(task, tiles, rows),
                }
            }
        },
    );
}

/// Quantizes `values`, whole groups but for the last, and writes them to `target`.
///
/// # Safety
/// The instruction set must be there, and the records of all groups, which nobody else touches.
pub(super) unsafe fn quantize(isa: Isa, values: &[f32], target: Target) {
    // SAFETY: the caller's promise.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::quantize(values, target),
            _ => portable::quantize(values, target),
        }
    }
}

/// Calls `f` with ranges of tiles and rows (which begin at blocks of rows) that together are all.
fn share(
    team: &Team,
    tiles: usize,
    rows: usize,
    tile_bytes: usize,
    mut f: impl FnMut(Range<usize>, Range<usize>),
) {
    if rows <= BLOCK {
        let chunk = BYTES.div_ceil(tile_bytes.max(1)).next_multiple_of(TILES);
        team.for_chunks(tiles, chunk, |tiles| f(tiles, 0..rows));
        return;
    }
    let strips = tiles.div_ceil(TILES);
    team.for_chunks(strips * rows.div_ceil(ROWS), 1, |range| {
        for at in range {
            let (strip, part) = (at % strips, at / strips);
            f(
                strip * TILES..tiles.min((strip + 1) * TILES),
                part * ROWS..rows.min((part + 1) * ROWS),
            );
        }
    });
}

/// Calls a kernel with the constants of a code: bits, groups in 32 inputs, whether scales are wide, whether there are minima.
macro_rules! by_code {
    ($code:expr, $kernel:ident($($argument:expr),*)) => {{
        let code = $code;
        match (code.bits, code.group, code.wide, code.min) {
            (4, _, false, false) => $kernel::<4, 1, false, false>($($argument),*),
            (4, _, false, true) => $kernel::<4, 1, false, true>($($argument),*),
            (4, _, true, _) => $kernel::<4, 1, true, true>($($argument),*),
            (_, 16, _, _) => $kernel::<8, 2, true, false>($($argument),*),
            (_, _, false, false) => $kernel::<8, 1, false, false>($($argument),*),
            (_, _, false, true) => $kernel::<8, 1, false, true>($($argument),*),
            (_, _, true, _) => $kernel::<8, 1, true, true>($($argument),*),
        }
    }};
}

/// Calls a kernel, which takes a number of rows and of tiles as its last two constants and the first tile and row as its last
/// two arguments, for all blocks of four rows and three tiles, and for what is left of both.
macro_rules! tile_by_rows {
    ($kernel:ident::<$($constant:ident),* $(, $block:literal)?>($($argument:expr),*), $tiles:expr, $rows:expr) => {{
        let (mut tile, tiles, rows) = ($tiles.start, $tiles.end, $rows);
        while tile < tiles {
            let whole = tiles - tile >= TILES;
            let mut row = rows.start;
            while row < rows.end {
                match (rows.end - row, whole) {
                    (1, true) => $kernel::<$($constant,)* $($block,)? 1, 3>($($argument,)* tile, row),
                    (2, true) => $kernel::<$($constant,)* $($block,)? 2, 3>($($argument,)* tile, row),
                    (3, true) => $kernel::<$($constant,)* $($block,)? 3, 3>($($argument,)* tile, row),
                    (_, true) => $kernel::<$($constant,)* $($block,)? 4, 3>($($argument,)* tile, row),
                    (1, false) => $kernel::<$($constant,)* $($block,)? 1, 1>($($argument,)* tile, row),
                    (2, false) => $kernel::<$($constant,)* $($block,)? 2, 1>($($argument,)* tile, row),
                    (3, false) => $kernel::<$($constant,)* $($block,)? 3, 1>($($argument,)* tile, row),
                    (_, false) => $kernel::<$($constant,)* $($block,)? 4, 1>($($argument,)* tile, row),
                }
                row += 4;
            }
            tile += if whole { TILES } else { 1 };
        }
    }};
}

use {by_code, tile_by_rows};

/// Writes the results of one row in one tile, those that exist.
///
/// # Safety
/// The row must lie within `y`, and nobody else touch this part of it.
unsafe fn store(output: &Output, row: usize, tile: usize, mut values: [f32; TILE]) {
    let first = tile * TILE;
    if !output.bias.is_null() {
        for (i, value) in values.iter_mut().enumerate() {
            // SAFETY: the bias has whole tiles.
            *value += unsafe { *output.bias.add(first + i) };
        }
    }
    let len = TILE.min(output.stride - first);
    // SAFETY: the caller's promise.
    unsafe {
        let to = output.y.add(row * output.stride + first);
        std::ptr::copy_nonoverlapping(values.as_ptr(), to, len);
    }
}
