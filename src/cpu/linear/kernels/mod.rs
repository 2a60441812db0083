//! The inner loops, one file for each instruction set, and how a team shares a multiplication.

#![allow(
    clippy::cast_ptr_alignment,
    reason = "packed weights and records are aligned"
)]

mod portable;

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
pub(super) unsafe fn integers(_isa: Isa, team: &Team, task: &integers::Task) {
    let weights = task.weights;
    let tile_bytes = weights.groups * (weights.group_bytes() + weights.scale_bytes());
    share(
        team,
        weights.tiles,
        task.x.rows(),
        tile_bytes,
        |tiles, rows| {
            // SAFETY: the caller's promise.
            unsafe { portable::integers(task, tiles, rows) };
        },
    );
}

/// Multiplies rows of floats on all threads of the team, and waits for all.
///
/// # Safety
/// As for [`integers`].
pub(super) unsafe fn floats(_isa: Isa, team: &Team, task: &floats::Task) {
    let weights = task.weights;
    share(
        team,
        weights.tiles,
        task.rows,
        weights.bytes() / weights.tiles.max(1),
        |tiles, rows| {
            // SAFETY: the caller's promise.
            unsafe { portable::floats(task, tiles, rows) };
        },
    );
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
