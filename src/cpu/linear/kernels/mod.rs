//! The inner loops, one file for each instruction set, and how a team shares a multiplication.

#![allow(
    clippy::cast_ptr_alignment,
    reason = "packed weights and records are aligned"
)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod floats;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use super::integers::{self, SHARED};
use super::record::Target;
use super::{BLOCK, Output, TILE, floats::Task as FloatTask};
use crate::cpu::isa::Isa;
use crate::cpu::pool::Team;
use crate::cpu::quant::GROUP;
use crate::cpu::simd::all_finite;
use std::ops::Range;

/// Number of tiles of a unit with many rows.
const TILES: usize = 3;
/// Number of rows of a unit.
const ROWS: usize = 64;
/// Maximum number of bytes of weights of a unit with few rows. A longer range is read from memory faster, but with shorter ones
/// other threads can take over the work of one that was delayed.
const BYTES: usize = 768 << 10;

/// Multiplies rows of integers on all threads of the team, and waits for all.
///
/// # Safety
/// The instruction set must be there; the buffers of the task are of the right sizes, nobody writes `x`, and nobody else touches
/// `y`.
pub(super) unsafe fn integers(isa: Isa, team: &Team, task: &integers::Task) {
    let weights = task.weights;
    share(
        team,
        weights.tiles,
        task.x.rows(),
        weights.tile_bytes(),
        // SAFETY: the caller's promise.
        |tiles, rows| unsafe { integers_part(isa, task, tiles, rows) },
    );
}

/// Multiplies some rows, which begin with a block, by some tiles, on this thread.
///
/// # Safety
/// As for [`integers`], of these tiles and rows.
pub(super) unsafe fn integers_part(
    isa: Isa,
    task: &integers::Task,
    tiles: Range<usize>,
    rows: Range<usize>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::integers(task, tiles, rows),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2Vnni => avx2::integers_vnni(task, tiles, rows),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::integers(task, tiles, rows),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => neon::integers(task, tiles, rows),
            _ => portable::integers(task, tiles, rows),
        }
    }
}

/// Multiplies rows of floats on all threads of the team, and waits for all.
///
/// # Safety
/// As for [`integers`].
pub(super) unsafe fn floats(isa: Isa, team: &Team, task: &FloatTask) {
    let weights = task.weights;
    share(
        team,
        weights.tiles,
        task.rows,
        weights.bytes() / weights.tiles.max(1),
        // SAFETY: the caller's promise.
        |tiles, rows| unsafe { floats_part(isa, task, tiles, rows) },
    );
}

/// Multiplies some rows by some tiles, on this thread.
///
/// # Safety
/// As for [`integers`], of these tiles and rows.
pub(super) unsafe fn floats_part(
    isa: Isa,
    task: &FloatTask,
    tiles: Range<usize>,
    rows: Range<usize>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::floats(task, tiles, rows),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx2Vnni => avx2::floats(task, tiles, rows),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => neon::floats(task, tiles, rows),
            _ => portable::floats(task, tiles, rows),
        }
    }
}

/// Quantizes the groups of `rows` rows and writes them to `target`, the place of the first row. The rows are `stride` apart in
/// `values`, which ends with the last row. If a row has a value that is not finite, its products are NaN.
///
/// # Safety
/// The instruction set must be there, and the records of all groups, which nobody else touches.
pub(super) unsafe fn quantize(
    isa: Isa,
    values: &[f32],
    rows: usize,
    stride: usize,
    target: Target,
) {
    let len = values.len() - (rows - 1) * stride;
    // SAFETY: the caller's promise.
    unsafe { round(isa, values, rows, stride, target) };
    for row in 0..rows {
        if !all_finite(isa, &values[row * stride..row * stride + len]) {
            let row = target.row + row;
            // SAFETY: the caller's promise.
            unsafe { Target { row, ..target }.spoil() };
        }
    }
}

/// Quantizes as [`quantize`] does, for finite values.
///
/// # Safety
/// As for [`quantize`].
unsafe fn round(isa: Isa, values: &[f32], rows: usize, stride: usize, target: Target) {
    let len = values.len() - (rows - 1) * stride;
    #[cfg(target_arch = "x86_64")]
    if rows == BLOCK && len.is_multiple_of(GROUP) {
        // SAFETY: the caller's promise.
        match isa {
            Isa::Avx512 => return unsafe { avx512::quantize_block(values, stride, target.record) },
            Isa::Avx2 | Isa::Avx2Vnni => {
                return unsafe { avx2::quantize_block(values, stride, target.record) };
            }
            _ => {}
        }
    }
    for row in 0..rows {
        let values = &values[row * stride..row * stride + len];
        let target = Target {
            row: target.row + row,
            ..target
        };
        // SAFETY: the caller's promise.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => avx512::quantize(values, target),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 | Isa::Avx2Vnni => avx2::quantize(values, target),
                #[cfg(target_arch = "aarch64")]
                Isa::NeonDot => neon::quantize(values, target),
                _ => portable::quantize(values, target),
            }
        }
    }
}

/// Calls `f` with ranges of tiles and rows that together cover everything. Ranges of rows begin with a block.
fn share(
    team: &Team,
    tiles: usize,
    rows: usize,
    tile_bytes: usize,
    mut f: impl FnMut(Range<usize>, Range<usize>),
) {
    if rows <= BLOCK {
        // The same number of units for each thread.
        let units = (tiles * tile_bytes).div_ceil(BYTES * team.size()) * team.size();
        let unit = tiles.div_ceil(units.max(1)).next_multiple_of(TILES);
        team.for_chunks(tiles, unit, |tiles| f(tiles, 0..rows));
        return;
    }
    let strips = tiles.div_ceil(TILES);
    let units = strips * rows.div_ceil(ROWS);
    // A few long pieces: a kernel prefetches the weights of the next strip, which should be this thread's next one.
    team.for_chunks(units, units / (team.size() * 3), |range| {
        for at in range {
            let (strip, part) = (at % strips, at / strips);
            f(
                strip * TILES..tiles.min((strip + 1) * TILES),
                part * ROWS..rows.min((part + 1) * ROWS),
            );
        }
    });
}

/// Stands for the bits of integers that are indices of 4 bits into a table of bytes.
const INDEX: usize = 48;

/// Number of bits that integers take in memory, by a kernel's constant.
const fn stored_bits(bits: usize) -> usize {
    if bits == INDEX { 4 } else { bits }
}

/// Number of bits that integers have when they are multiplied.
const fn bits_of_value(bits: usize) -> usize {
    if bits == INDEX { 8 } else { bits }
}

/// Calls a kernel with the constants of a code: bits, groups per 32 inputs, whether scales are nested, and whether there are
/// minima.
macro_rules! by_code {
    ($code:expr, $kernel:ident($($argument:expr),*)) => {{
        let code = $code;
        match (code.bits, code.group, code.nested, code.min) {
            (_, 32, false, _) if code.table.is_some() => $kernel::<INDEX, 1, false, false>($($argument),*),
            (_, 32, true, _) if code.table.is_some() => $kernel::<INDEX, 1, true, false>($($argument),*),
            (_, _, false, _) if code.table.is_some() => $kernel::<INDEX, 2, false, false>($($argument),*),
            (_, _, true, _) if code.table.is_some() => $kernel::<INDEX, 2, true, false>($($argument),*),
            (2, ..) => $kernel::<2, 2, true, true>($($argument),*),
            (4, _, false, false) => $kernel::<4, 1, false, false>($($argument),*),
            (4, _, false, true) => $kernel::<4, 1, false, true>($($argument),*),
            (4, _, true, _) => $kernel::<4, 1, true, true>($($argument),*),
            (6, 16, ..) => $kernel::<6, 2, true, false>($($argument),*),
            (6, _, false, false) => $kernel::<6, 1, false, false>($($argument),*),
            (6, _, false, true) => $kernel::<6, 1, false, true>($($argument),*),
            (6, _, true, _) => $kernel::<6, 1, true, true>($($argument),*),
            _ => $kernel::<8, 1, false, false>($($argument),*),
        }
    }};
}

/// Calls a kernel, which takes a number of rows as its last constant (before that of columns, where given) and the first row as
/// its last argument, for all blocks of four rows and for the rows that are left.
macro_rules! by_rows {
    ($kernel:ident::<$($constant:ident),* $(; $block:literal)?>($($argument:expr),*) $(by $columns:literal)?, $rows:expr) => {{
        let mut row = $rows.start;
        while row < $rows.end {
            match $rows.end - row {
                1 => $kernel::<$($constant,)* $($block,)? 1 $(, $columns)?>($($argument,)* row),
                2 => $kernel::<$($constant,)* $($block,)? 2 $(, $columns)?>($($argument,)* row),
                3 => $kernel::<$($constant,)* $($block,)? 3 $(, $columns)?>($($argument,)* row),
                _ => $kernel::<$($constant,)* $($block,)? 4 $(, $columns)?>($($argument,)* row),
            }
            row += 4;
        }
    }};
}

use {by_code, by_rows};

/// Distances between the parts of packed weights of one code, in bytes. The constants are those of [`by_code`].
struct Strides {
    /// The integers of a group of a tile.
    q_step: usize,
    /// The integers of a tile.
    q_tile: usize,
    /// One scale.
    scale: usize,
    /// The scales and minima of a group of a tile, without factors.
    scale_step: usize,
    /// The factors that groups share.
    factors: usize,
    /// The scales, minima and factors of a tile.
    scale_tile: usize,
}

impl Strides {
    #[inline]
    const fn of<const BITS: usize, const GROUPS: usize, const NESTED: bool, const MIN: bool>(
        groups: usize,
    ) -> Self {
        let with_min = MIN as usize;
        let q_step = GROUP * TILE * stored_bits(BITS) / 8;
        let scale = if NESTED { 1 } else { 2 };
        let scale_step = scale * TILE * GROUPS * (1 + with_min);
        let factors = if NESTED { 2 * TILE * (1 + with_min) } else { 0 };
        Self {
            q_step,
            q_tile: groups * q_step,
            scale,
            scale_step,
            factors,
            scale_tile: groups * scale_step + groups / SHARED * factors,
        }
    }
}

/// The offset of row `r` for the middle of the integers' range: its negative, times the sum of a group's activations.
///
/// # Safety
/// `tail` must be the end of a record.
#[inline]
unsafe fn offset<const BITS: usize, const GROUPS: usize>(
    tail: *const i32,
    block: usize,
    r: usize,
    part: usize,
) -> i32 {
    // SAFETY: the caller's promise.
    let (by_8, first_by_128) = unsafe { (*tail.add(2 * block + r), *tail.add(3 * block + r)) };
    let bits = bits_of_value(BITS);
    let first = first_by_128 >> (8 - bits);
    match (GROUPS, part) {
        (1, _) => by_8 << (bits - 4),
        (_, 0) => first,
        _ => (by_8 << (bits - 4)) - first,
    }
}

/// The factor of minima for row `r`: the sum of a group's activations.
///
/// # Safety
/// `tail` must be the end of a record.
#[inline]
unsafe fn weighted<const GROUPS: usize>(
    tail: *const f32,
    block: usize,
    r: usize,
    part: usize,
) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        if GROUPS == 1 {
            return *tail.add(block + r);
        }
        let sums = tail.cast::<i32>();
        let (sum, first) = (
            -(*sums.add(2 * block + r) >> 3),
            -(*sums.add(3 * block + r) >> 7),
        );
        let integers = if part == 0 { first } else { sum - first };
        *tail.add(r) * integers as f32
    }
}

/// Writes the existing results of one row in one tile.
///
/// # Safety
/// The row must lie within `y`, and nobody else touch this part of it.
#[inline]
unsafe fn store(output: &Output, row: usize, tile: usize, mut values: [f32; TILE]) {
    let first = tile * TILE;
    // SAFETY: the bias has whole tiles; the caller's promise.
    unsafe {
        if !output.bias.is_null() {
            let bias = output.bias.add(first).cast::<[f32; TILE]>();
            for (value, bias) in values.iter_mut().zip(bias.read_unaligned()) {
                *value += bias;
            }
        }
        let to = output.y.add(row * output.stride + first);
        let len = output.stride - first;
        if len >= TILE {
            to.cast::<[f32; TILE]>().write_unaligned(values);
        } else {
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, len);
        }
    }
}
