//! The operations of a step on rows of activations, spread over a team. Every thread of the team calls each of them with the
//! same arguments, and each ends with a barrier.
//!
//! Where an operation takes `quantized`, it also writes the rows there, for the linear layer that comes next.

use super::activation::{Activate, Activation};
use super::attention::KvView;
use super::elementwise::{AddNormRow, AddRow, Cap, Norm, NormRow, RopeAndCache as RotateRow};
use super::linear::Linear;
use super::simd::dispatch;
use super::{Isa, QuantizedRows, SharedSlice, Team};
use std::ops::Range;

/// Rows that a thread takes at once: enough for taking them not to count, few enough for all threads to get some.
fn chunk(team: &Team, rows: usize) -> usize {
    (rows / (4 * team.size())).clamp(1, 16)
}

/// The same where the rows are quantized too: whole blocks, which lie in the same cache lines.
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

/// `out` = the norm of each row of `x`, all as wide as its weight.
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

/// `residual += x * scale`, of `rows` rows of `width`.
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

/// `x *= factor`, of `rows` rows of `width`.
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

/// Each of `rows` rows of `x`, `width` wide, times 1 / (1 + e^-gate) of its number of `gates`.
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

/// Every number of `x` times `scale`, if there is one, then `cap * tanh(x / cap)` where there is a cap.
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

/// Rows in a buffer: `width` numbers from `start` on, `stride` from one to the next.
#[derive(Clone, Copy)]
pub struct Columns<'a> {
    /// Where they lie.
    pub buffer: SharedSlice<'a, f32>,
    /// Of the first row.
    pub start: usize,
    /// From a row to the next.
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

/// `out` [rows, width] = the activation of `x`, times `factor` where there is one.
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

/// How one layer rotates and stores.
#[derive(Clone, Copy)]
pub struct RopeAndCache<'a> {
    /// Query heads.
    pub heads: usize,
    /// Tables of cos and sin, `[positions, head_dim / 2]` each; `None`: nothing is rotated.
    pub angles: Option<(&'a [f32], &'a [f32])>,
    /// What the queries of each position are multiplied by.
    pub query_scales: Option<&'a [f32]>,
    /// The norm that queries pass before: a head wide, or as wide as all heads.
    pub q_norm: Option<Norm<'a>>,
    /// The same for keys.
    pub k_norm: Option<Norm<'a>>,
    /// The same for values.
    pub v_norm: Option<Norm<'a>>,
    /// Where keys and values go.
    pub cache: KvView<'a>,
}

impl RopeAndCache<'_> {
    /// Rotates q and k of `qkv` [tokens, q | k | v] in place, each token by its position, and stores k and v at its slot.
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

/// `out` [chosen, width]: some rows of `x` [.., width].
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

/// Calls `f` for each row, which writes it to `out`, and quantizes what a block's rows have become.
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
mod tests {
    use super::super::attention::{KvCache, KvShape, KvType};
    use super::super::{Aligned, FloatType, Format, Matrix, Pool, Stored};
    use super::*;

    const WIDTH: usize = 64;

    fn waves(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    /// What `f` writes on a team of 3, into zeros.
    fn run(len: usize, f: impl Fn(&Team, SharedSlice<f32>) + Sync) -> Vec<f32> {
        let mut out = vec![0.0; len];
        let shared = SharedSlice::new(&mut out);
        Pool::new(3).run(&|team| f(team, shared));
        out
    }

    fn layer(out: usize, width: usize, format: Format) -> Linear {
        let weights = waves(out * width);
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let matrix = Matrix {
            stored: Stored::Floats(FloatType::F32, format),
            rows: out,
            columns: width,
            bytes: &bytes,
            bias: None,
        };
        let mut layers = Linear::pack(Isa::detect(), &Pool::new(1), &[matrix]).unwrap();
        layers.remove(0)
    }

    fn rms(weight: &[f32]) -> Norm<'_> {
        Norm {
            weight,
            bias: None,
            eps: 1e-5,
            centered: false,
        }
    }

    #[test]
    fn every_row_is_computed_once_whoever_computes_it() {
        let isa = Isa::detect();
        let (x, weight) = (waves(50 * WIDTH), waves(WIDTH));
        let given = SharedSlice::read_only(&x);
        // SAFETY: nobody else has the buffers.
        let normed = run(50 * WIDTH, |team, out| unsafe {
            norm(team, isa, given, 50, (rms(&weight), 1), out, None);
        });
        let mut one = vec![0.0; WIDTH];
        for (row, found) in x.chunks(WIDTH).zip(normed.chunks(WIDTH)) {
            let row = NormRow {
                x: row,
                norm: rms(&weight),
                out: &mut one,
            };
            dispatch(isa, row);
            assert_eq!(found, one);
        }
        let chosen: Vec<i32> = (0..20).map(|i| (i * 7) % 50).collect();
        // SAFETY: as above.
        let gathered = run(20 * WIDTH, |team, out| unsafe {
            gather(team, given, WIDTH, &chosen, out);
        });
        for (&row, found) in chosen.iter().zip(gathered.chunks(WIDTH)) {
            assert_eq!(found, &x[row as usize * WIDTH..][..WIDTH]);
        }
        let table = layer(50, WIDTH, Format::F32);
        // SAFETY: as above.
        let embedded = run(20 * WIDTH, |team, out| unsafe {
            embed(team, &table, &chosen, 1.0, out);
        });
        assert_eq!(embedded, gathered);
    }

    #[test]
    fn rows_quantized_on_the_way_are_those_that_a_layer_quantizes_itself() {
        let isa = Isa::detect();
        let rows = 7;
        let (x, gate_up) = (waves(rows * WIDTH), waves(rows * 2 * WIDTH));
        let linear = layer(48, WIDTH, Format::Int8);
        let weight = vec![1.5; WIDTH];
        for way in 0..3 {
            let (mut inner, mut inner_again) = (vec![0.0; rows * WIDTH], vec![0.0; rows * WIDTH]);
            let mut residuals = [waves(rows * WIDTH), waves(rows * WIDTH)];
            let [first, second] = &mut residuals;
            let (mut a, mut b) = (
                Aligned::<u8>::zeroed(linear.scratch_bytes(rows)),
                Aligned::<u8>::zeroed(linear.scratch_bytes(rows)),
            );
            let (inner, inner_again) = (
                SharedSlice::new(&mut inner),
                SharedSlice::new(&mut inner_again),
            );
            let (first, second) = (SharedSlice::new(first), SharedSlice::new(second));
            let (a, b) = (SharedSlice::new(&mut a), SharedSlice::new(&mut b));
            let (x, gate_up) = (SharedSlice::read_only(&x), SharedSlice::read_only(&gate_up));
            let columns = |start| Columns {
                buffer: gate_up,
                start,
                stride: 2 * WIDTH,
            };
            let (gate, up) = (columns(0), columns(WIDTH));
            let write = |team: &Team, residual, out, quantized: Option<&QuantizedRows>| {
                // SAFETY: nobody else has the buffers.
                unsafe {
                    match way {
                        0 => norm(team, isa, x, rows, (rms(&weight), 1), out, quantized),
                        1 => add_norm(
                            team,
                            isa,
                            (x, 1.0),
                            residual,
                            rows,
                            rms(&weight),
                            out,
                            quantized,
                        ),
                        _ => activate(
                            team,
                            isa,
                            Activation::Silu,
                            gate,
                            Some(up),
                            (rows, WIDTH),
                            out,
                            quantized,
                        ),
                    }
                }
            };
            let found = run(rows * 48, |team, out| {
                let quantized = QuantizedRows::new(a, rows, WIDTH);
                write(team, first, inner, Some(&quantized));
                // SAFETY: as above.
                unsafe { linear.forward_quantized(team, &quantized, out) };
            });
            let expected = run(rows * 48, |team, out| {
                write(team, second, inner_again, None);
                // SAFETY: as above.
                unsafe { linear.forward(team, inner_again, rows, out, b) };
            });
            assert_eq!(found, expected);
            assert!(found.iter().any(|&y| y != 0.0));
        }
    }

    #[test]
    fn sums_scales_and_caps_of_any_length() {
        let isa = Isa::detect();
        let x = waves(7 * 13);
        let given = SharedSlice::read_only(&x);
        let found = run(x.len(), |team, out| {
            // SAFETY: nobody else has the buffers.
            unsafe {
                add(team, isa, (given, 0.5), out, 7, 13);
                add(team, isa, (given, 1.0), out, 7, 13);
                scale(team, out, 7, 13, 4.0);
                cap(team, isa, out, x.len(), Some(0.5), Some(3.0));
            }
        });
        for (found, x) in found.iter().zip(&x) {
            assert!((found - 3.0 * x.tanh()).abs() < 1e-6, "{found} for {x}");
        }
    }

    #[test]
    fn tokens_are_rotated_by_their_position_and_stored_at_their_slot() {
        let shape = KvShape {
            dtype: KvType::F32,
            kv_heads: 2,
            head_dim: 8,
        };
        let mut cache = KvCache::new(&[shape; 2], 3);
        let tables = waves(20 * 4);
        let (positions, slots) = ([3, 19, 0, 7], [40, 1, 17, 5]);
        let width = (4 + 2 * 2) * 8;
        let given = waves(4 * width);
        let rope = RopeAndCache {
            heads: 4,
            angles: Some((&tables, &tables)),
            query_scales: None,
            q_norm: None,
            k_norm: None,
            v_norm: None,
            cache: cache.view().layer(1),
        };
        let rotated = run(4 * width, |team, qkv| {
            if team.index() == 0 {
                // SAFETY: the others wait at the barrier.
                unsafe { qkv.get_mut(0..4 * width) }.copy_from_slice(&given);
            }
            team.barrier();
            // SAFETY: nobody else has the buffers, and the slots differ.
            unsafe { rope.run(team, Isa::detect(), (qkv, width), &positions, &slots) };
        });
        for token in 0..4 {
            let (row, raw) = (&rotated[token * width..], &given[token * width..]);
            let angle = tables[positions[token] as usize * 4];
            assert!((row[0] - (raw[0] - raw[4]) * angle).abs() < 1e-6);
            let stored = rope.cache.page_rows(slots[token] as usize, 1);
            assert_eq!(stored.0, row[5 * 8..6 * 8]);
            assert_eq!(stored.1, raw[7 * 8..8 * 8]);
        }
    }
}
