//! Operations of a step on rows of activations, divided among a team. Every thread of the team calls each of them with the same
//! arguments, and each ends with a barrier.
//!
//! If `quantized` is given, an operation also writes its rows there, for the linear layer that follows.

use super::activation::{Activate, Activation};
use super::attention::KvView;
use super::elementwise::{AddNormRow, AddRow, Cap, Norm, NormRow, RopeAndCache as RotateRow};
use super::linear::Linear;
use super::simd::dispatch;
use super::{Isa, QuantizedRows, SharedSlice, Team};
use std::ops::Range;

/// Number of rows that a thread takes at once: enough that taking them costs little, and few enough that all threads get some.
fn chunk(team: &Team, rows: usize) -> usize {
    (rows / (4 * team.size())).clamp(1, 16)
}

/// The same for rows that are quantized too: whole blocks, which share cache lines.
fn quantized_chunk(team: &Team, rows: usize, quantized: Option<&QuantizedRows>) -> usize {
    let chunk = chunk(team, rows);
    quantized.map_or(chunk, |rows| chunk.next_multiple_of(rows.block()))
}

/// `out` [rows, width]: the rows `ids` of the table [vocab, width] that a linear layer's weights are, times `scale`.
///
/// # Safety
/// Until it returns on all threads, nobody else may touch `out`.
///
/// # Panics
/// If an id is not in the table, or `out` is too small.
pub unsafe fn embed(team: &Team, table: &Linear, ids: &[i32], scale: f32, out: SharedSlice<f32>) {
    let width = table.in_features();
    team.for_chunks(ids.len(), chunk(team, ids.len()), |rows| {
        for row in rows {
            // SAFETY: each row is written by one thread.
            let to = unsafe { out.get_mut(row * width..(row + 1) * width) };
            table.dequantize_row(ids[row] as usize, to);
            for x in to {
                *x *= scale;
            }
        }
    });
}

/// `out`: for each row, the columns of one value, followed by those of the other. Each value is given with its width.
///
/// # Safety
/// Until it returns on all threads, nobody may write the values, and nobody else touch `out`.
///
/// # Panics
/// If a buffer is too small.
pub unsafe fn join(
    team: &Team,
    (first, width): (SharedSlice<f32>, usize),
    (second, other): (SharedSlice<f32>, usize),
    rows: usize,
    out: SharedSlice<f32>,
) {
    team.for_chunks(rows, chunk(team, rows), |range| {
        for row in range {
            // SAFETY: each row is written by one thread.
            unsafe {
                let to = out.get_mut(row * (width + other)..(row + 1) * (width + other));
                to[..width].copy_from_slice(first.get(row * width..(row + 1) * width));
                to[width..].copy_from_slice(second.get(row * other..(row + 1) * other));
            }
        }
    });
}

/// `out` = the norm of each row of `x`. Rows are as wide as the weight.
///
/// # Safety
/// Until it returns on all threads, nobody may write `x`, and nobody else touch `out` or `quantized`.
///
/// # Panics
/// If a buffer is too small.
pub unsafe fn norm(
    team: &Team,
    isa: Isa,
    x: SharedSlice<f32>,
    rows: usize,
    (norm, parts): (Norm, usize),
    out: SharedSlice<f32>,
    quantized: Option<&QuantizedRows>,
) {
    let width = norm.weight.len() / parts;
    team.for_chunks(rows, quantized_chunk(team, rows, quantized), |range| {
        let each = |row: usize| {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is written by one thread.
            unsafe {
                let row = NormRow {
                    x: x.get(at.clone()),
                    norm: norm.part(row % parts, width),
                    out: out.get_mut(at),
                };
                dispatch(isa, row);
            }
        };
        // SAFETY: each block is written by one thread.
        unsafe { by_blocks(isa, range, quantized, out, width, each) };
    });
}

/// `residual += x * scale`, then `out` is the norm of the sum, as in [`norm`].
///
/// # Safety
/// Until it returns on all threads, nobody may write `x`, and nobody else touch `residual`, `out` or `quantized`.
///
/// # Panics
/// If a buffer is too small.
#[allow(clippy::too_many_arguments)]
pub unsafe fn add_norm(
    team: &Team,
    isa: Isa,
    (x, scale): (SharedSlice<f32>, f32),
    residual: SharedSlice<f32>,
    rows: usize,
    norm: Norm,
    out: SharedSlice<f32>,
    quantized: Option<&QuantizedRows>,
) {
    let width = norm.weight.len();
    team.for_chunks(rows, quantized_chunk(team, rows, quantized), |range| {
        let each = |row: usize| {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is written by one thread.
            unsafe {
                let row = AddNormRow {
                    x: x.get(at.clone()),
                    scale,
                    residual: residual.get_mut(at.clone()),
                    norm,
                    out: out.get_mut(at),
                };
                dispatch(isa, row);
            }
        };
        // SAFETY: each block is written by one thread.
        unsafe { by_blocks(isa, range, quantized, out, width, each) };
    });
}

/// `residual += x * scale` for `rows` rows of `width`.
///
/// # Safety
/// Until it returns on all threads, nobody may write `x`, and nobody else touch `residual`.
///
/// # Panics
/// If a buffer is too small.
pub unsafe fn add(
    team: &Team,
    isa: Isa,
    (x, scale): (SharedSlice<f32>, f32),
    residual: SharedSlice<f32>,
    rows: usize,
    width: usize,
) {
    team.for_chunks(rows, chunk(team, rows), |range| {
        let at = range.start * width..range.end * width;
        // SAFETY: each row is written by one thread.
        unsafe {
            let row = AddRow {
                x: x.get(at.clone()),
                scale,
                residual: residual.get_mut(at),
            };
            dispatch(isa, row);
        }
    });
}

/// `x *= factor` for `rows` rows of `width`.
///
/// # Safety
/// Until it returns on all threads, nobody else may touch `x`.
///
/// # Panics
/// If the buffer is too small.
pub unsafe fn scale(team: &Team, x: SharedSlice<f32>, rows: usize, width: usize, factor: f32) {
    team.for_chunks(rows, chunk(team, rows), |range| {
        // SAFETY: each row is written by one thread.
        let rows = unsafe { x.get_mut(range.start * width..range.end * width) };
        for x in rows {
            *x *= factor;
        }
    });
}

/// Multiplies each of the `rows` rows of `x`, `width` wide, by the sigmoid of its entry of `gates`.
///
/// # Safety
/// Until it returns on all threads, nobody may write `gates`, and nobody else touch `x`.
///
/// # Panics
/// If a buffer is too small.
pub unsafe fn gate_rows(
    team: &Team,
    x: SharedSlice<f32>,
    gates: SharedSlice<f32>,
    rows: usize,
    width: usize,
) {
    team.for_chunks(rows, chunk(team, rows), |range| {
        for row in range {
            // SAFETY: each row is written by one thread.
            let (x, gate) = unsafe {
                let gate = gates.get(row..row + 1)[0];
                (x.get_mut(row * width..(row + 1) * width), gate)
            };
            let factor = 1.0 / (1.0 + (-gate).exp());
            for x in x {
                *x *= factor;
            }
        }
    });
}

/// Multiplies every number of `x` by `scale`, if it is given, and then applies `cap * tanh(x / cap)`, if there is a cap.
///
/// # Safety
/// Until it returns on all threads, nobody else may touch the first `len` numbers of `x`.
///
/// # Panics
/// If the buffer is too small.
pub unsafe fn cap(
    team: &Team,
    isa: Isa,
    x: SharedSlice<f32>,
    len: usize,
    scale: Option<f32>,
    cap: Option<f32>,
) {
    let part = (len / (4 * team.size())).next_multiple_of(64);
    team.for_chunks(len, part.max(64), |range| {
        // SAFETY: each range is written by one thread.
        let x = unsafe { x.get_mut(range) };
        if let Some(scale) = scale {
            for x in &mut *x {
                *x *= scale;
            }
        }
        if let Some(cap) = cap {
            dispatch(isa, Cap { x, cap });
        }
    });
}

/// Rows in a buffer: `width` numbers from `start` on, `stride` apart.
#[derive(Clone, Copy)]
pub struct Columns<'a> {
    /// The buffer.
    pub buffer: SharedSlice<'a, f32>,
    /// Index of the first row's first number.
    pub start: usize,
    /// Distance from one row to the next.
    pub stride: usize,
}

impl Columns<'_> {
    /// # Safety
    /// Nobody may write the row while the result is in use.
    unsafe fn row(&self, row: usize, width: usize) -> &[f32] {
        let start = self.start + row * self.stride;
        // SAFETY: the caller's promise.
        unsafe { self.buffer.get(start..start + width) }
    }
}

/// `out` [rows, width] = the activation of `x`, times `factor` if it is given.
///
/// # Safety
/// Until it returns on all threads, nobody may write `x` and `factor`, and nobody else touch `out` or `quantized`.
///
/// # Panics
/// If a buffer is too small.
#[allow(clippy::too_many_arguments)]
pub unsafe fn activate(
    team: &Team,
    isa: Isa,
    activation: Activation,
    x: Columns,
    factor: Option<Columns>,
    (rows, width): (usize, usize),
    out: SharedSlice<f32>,
    quantized: Option<&QuantizedRows>,
) {
    team.for_chunks(rows, quantized_chunk(team, rows, quantized), |range| {
        let each = |row: usize| {
            // SAFETY: each row is written by one thread.
            unsafe {
                let activate = Activate {
                    activation,
                    x: x.row(row, width),
                    factor: factor.as_ref().map(|factor| factor.row(row, width)),
                    out: out.get_mut(row * width..(row + 1) * width),
                };
                dispatch(isa, activate);
            }
        };
        // SAFETY: each block is written by one thread.
        unsafe { by_blocks(isa, range, quantized, out, width, each) };
    });
}

/// Rotates and stores the queries, keys and values of one layer.
#[derive(Clone, Copy)]
pub struct RopeAndCache<'a> {
    /// Number of query heads.
    pub heads: usize,
    /// Tables of cos and sin, `[positions, head_dim / 2]` each. `None`: no rotation.
    pub angles: Option<(&'a [f32], &'a [f32])>,
    /// Factors of the queries by position.
    pub query_scales: Option<&'a [f32]>,
    /// The norm of queries before the rotation, as wide as a head or as all heads.
    pub q_norm: Option<Norm<'a>>,
    /// The norm of keys.
    pub k_norm: Option<Norm<'a>>,
    /// The norm of values.
    pub v_norm: Option<Norm<'a>>,
    /// The cache of keys and values.
    pub cache: KvView<'a>,
}

impl RopeAndCache<'_> {
    /// Rotates q and k of `qkv` [tokens, q | k | v] in place, by each token's position, and stores k and v in its slot. If rows of
    /// `width` contain only queries, nothing is stored.
    ///
    /// Where a row of `width` holds queries alone, nothing is stored.
    ///
    /// # Safety
    /// Slots must differ. Until it returns on all threads, nobody else may touch `qkv`, nor these slots of the cache.
    ///
    /// # Panics
    /// If `qkv` is too small, or a position or slot is not there.
    pub unsafe fn run(
        &self,
        team: &Team,
        isa: Isa,
        (qkv, width): (SharedSlice<f32>, usize),
        positions: &[i32],
        slots: &[i32],
    ) {
        let half = self.cache.shape().head_dim / 2;
        team.for_chunks(slots.len(), chunk(team, slots.len()), |range| {
            for row in range {
                let position = positions[row] as usize;
                let at = position * half..(position + 1) * half;
                let rotated = RotateRow {
                    // SAFETY: each row is written by one thread.
                    qkv: unsafe { qkv.get_mut(row * width..(row + 1) * width) },
                    heads: self.heads,
                    angles: self.angles.map(|(cos, sin)| (&cos[at.clone()], &sin[at])),
                    query_scale: self.query_scales.map(|scales| scales[position]),
                    q_norm: self.q_norm,
                    k_norm: self.k_norm,
                    v_norm: self.v_norm,
                    cache: self.cache,
                    slot: slots[row] as usize,
                    next_slot: slots.get(row + 1).map(|&slot| slot as usize),
                };
                dispatch(isa, rotated);
            }
        });
    }
}

/// `out` [chosen, width] = the chosen rows of `x` [.., width].
///
/// # Safety
/// Until it returns on all threads, nobody may write `x`, and nobody else touch `out`.
///
/// # Panics
/// If a row is not there, or `out` is too small.
pub unsafe fn gather(
    team: &Team,
    x: SharedSlice<f32>,
    width: usize,
    chosen: &[i32],
    out: SharedSlice<f32>,
) {
    team.for_chunks(chosen.len(), chunk(team, chosen.len()), |range| {
        for row in range {
            let from = chosen[row] as usize;
            // SAFETY: each row is written by one thread.
            unsafe {
                let from = x.get(from * width..(from + 1) * width);
                out.get_mut(row * width..(row + 1) * width)
                    .copy_from_slice(from);
            }
        }
    });
}

/// Calls `f` for each row to write it to `out`, and then quantizes the rows of a block.
///
/// # Safety
/// Nobody else may touch these rows of `out` and `quantized`.
unsafe fn by_blocks(
    isa: Isa,
    rows: Range<usize>,
    quantized: Option<&QuantizedRows>,
    out: SharedSlice<f32>,
    width: usize,
    mut f: impl FnMut(usize),
) {
    let block = quantized.map_or(1, QuantizedRows::block);
    for first in rows.clone().step_by(block) {
        let rows = first..rows.end.min(first + block);
        rows.clone().for_each(&mut f);
        if let Some(quantized) = quantized {
            // SAFETY: the rows are written; the caller's promise.
            unsafe {
                let values = out.get(rows.start * width..rows.end * width);
                quantized.set_rows(isa, rows, values);
            }
        }
    }
}

#[cfg(test)]
mod tests;
