//! The operations of a step on rows of activations, spread over a team. Every thread of the team calls each of them with the
//! same arguments, and each ends with a barrier.
//!
//! Where an operation takes `quantized`, it also writes the rows there, for the linear layer that comes next.

use super::attention::KvView;
use super::elementwise::{
    AddRmsNorm, HeadNorm, RmsNorm, RopeAndCache as RotateRow, SiluMul, pool_mean,
};
use super::linear::Linear;
use super::simd::dispatch;
use super::{Isa, QuantizedRows, Shared, Team};
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

/// `out` [rows, width]: the rows `ids` of the table [vocab, width] that a linear layer's weights are.
///
/// # Safety
/// Until it returns on all threads, nobody else may touch `out`.
///
/// # Panics
/// If an id is not in the table, or `out` is too small.
pub unsafe fn embed(team: &Team, table: &Linear, ids: &[i32], out: Shared<f32>) {
    let width = table.in_features();
    team.for_chunks(ids.len(), chunk(team, ids.len()), |rows| {
        for row in rows {
            // SAFETY: each row is written by one thread.
            let to = unsafe { out.get_mut(row * width..(row + 1) * width) };
            table.dequantize_row(ids[row] as usize, to);
        }
    });
}

/// `out = x * rsqrt(mean(x^2) + eps) * weight`, row by row; all as wide as `weight`.
///
/// # Safety
/// Until it returns on all threads, nobody may write `x`, and nobody else touch `out` or `quantized`.
///
/// # Panics
/// If a buffer is too small.
#[allow(clippy::too_many_arguments)]
pub unsafe fn rms_norm(
    team: &Team,
    isa: Isa,
    x: Shared<f32>,
    rows: usize,
    weight: &[f32],
    eps: f32,
    out: Shared<f32>,
    quantized: Option<&QuantizedRows>,
) {
    let width = weight.len();
    team.for_chunks(rows, quantized_chunk(team, rows, quantized), |range| {
        let each = |row: usize| {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is written by one thread.
            unsafe {
                let norm = RmsNorm {
                    x: x.get(at.clone()),
                    weight,
                    eps,
                    out: out.get_mut(at),
                };
                dispatch(isa, norm);
            }
        };
        // SAFETY: each block is written by one thread.
        unsafe { by_blocks(isa, range, quantized, out, width, each) };
    });
}

/// `residual += x`, then `out` is the RMS norm of the sum, as in [`rms_norm`].
///
/// # Safety
/// Until it returns on all threads, nobody may write `x`, and nobody else touch `residual`, `out` or `quantized`.
///
/// # Panics
/// If a buffer is too small.
#[allow(clippy::too_many_arguments)]
pub unsafe fn add_rms_norm(
    team: &Team,
    isa: Isa,
    x: Shared<f32>,
    residual: Shared<f32>,
    rows: usize,
    weight: &[f32],
    eps: f32,
    out: Shared<f32>,
    quantized: Option<&QuantizedRows>,
) {
    let width = weight.len();
    team.for_chunks(rows, quantized_chunk(team, rows, quantized), |range| {
        let each = |row: usize| {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is written by one thread.
            unsafe {
                let norm = AddRmsNorm {
                    x: x.get(at.clone()),
                    residual: residual.get_mut(at.clone()),
                    weight,
                    eps,
                    out: out.get_mut(at),
                };
                dispatch(isa, norm);
            }
        };
        // SAFETY: each block is written by one thread.
        unsafe { by_blocks(isa, range, quantized, out, width, each) };
    });
}

/// `out` [rows, width] `= silu(gate) * up` of `gate_up` [rows, 2 * width] = gate | up.
///
/// # Safety
/// Until it returns on all threads, nobody may write `gate_up`, and nobody else touch `out` or `quantized`.
///
/// # Panics
/// If a buffer is too small.
pub unsafe fn silu_mul(
    team: &Team,
    isa: Isa,
    gate_up: Shared<f32>,
    rows: usize,
    width: usize,
    out: Shared<f32>,
    quantized: Option<&QuantizedRows>,
) {
    team.for_chunks(rows, quantized_chunk(team, rows, quantized), |range| {
        let each = |row: usize| {
            // SAFETY: each row is written by one thread.
            unsafe {
                let gated = SiluMul {
                    gate_up: gate_up.get(2 * row * width..2 * (row + 1) * width),
                    out: out.get_mut(row * width..(row + 1) * width),
                };
                dispatch(isa, gated);
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
    /// Tables `[positions, head_dim / 2]`.
    pub cos: &'a [f32],
    /// As `cos`.
    pub sin: &'a [f32],
    /// Weight `[head_dim]` of the norm that each query head passes before.
    pub q_norm: Option<&'a [f32]>,
    /// The same for keys.
    pub k_norm: Option<&'a [f32]>,
    /// Of these norms.
    pub eps: f32,
    /// Where keys and values go.
    pub cache: KvView<'a>,
    /// In this layer.
    pub layer: usize,
}

impl RopeAndCache<'_> {
    /// Rotates q and k of `qkv` [tokens, q | k | v] in place, each token by its position, and stores k and v at its slot.
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
        qkv: Shared<f32>,
        positions: &[i32],
        slots: &[i32],
    ) {
        let shape = self.cache.shape();
        let width = (self.heads + 2 * shape.kv_heads) * shape.head_dim;
        let half = shape.head_dim / 2;
        let norm = |weight| HeadNorm {
            weight,
            eps: self.eps,
        };
        team.for_chunks(slots.len(), chunk(team, slots.len()), |range| {
            for row in range {
                let position = positions[row] as usize;
                let angles = position * half..(position + 1) * half;
                let rotated = RotateRow {
                    // SAFETY: each row is written by one thread.
                    qkv: unsafe { qkv.get_mut(row * width..(row + 1) * width) },
                    heads: self.heads,
                    cos: &self.cos[angles.clone()],
                    sin: &self.sin[angles],
                    q_norm: self.q_norm.map(norm),
                    k_norm: self.k_norm.map(norm),
                    cache: self.cache,
                    layer: self.layer,
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
pub unsafe fn gather(team: &Team, x: Shared<f32>, width: usize, chosen: &[i32], out: Shared<f32>) {
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

/// `out` [n, width]: the mean over each sequence's rows of `x`, `bounds[i]..bounds[i + 1]`, L2-normalised.
///
/// # Safety
/// Until it returns on all threads, nobody may write `x`, and nobody else touch `out`.
///
/// # Panics
/// If `bounds` is empty or a sequence is, or a buffer is too small.
pub unsafe fn pool(team: &Team, x: Shared<f32>, width: usize, bounds: &[i32], out: Shared<f32>) {
    team.for_chunks(bounds.len() - 1, 1, |range| {
        for sequence in range {
            let rows = bounds[sequence] as usize..bounds[sequence + 1] as usize;
            assert!(!rows.is_empty(), "sequence {sequence} has no tokens");
            // SAFETY: each row is written by one thread.
            unsafe {
                let states = x.get(rows.start * width..rows.end * width);
                pool_mean(
                    states,
                    out.get_mut(sequence * width..(sequence + 1) * width),
                );
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
    out: Shared<f32>,
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
    fn run(len: usize, f: impl Fn(&Team, Shared<f32>) + Sync) -> Vec<f32> {
        let mut out = vec![0.0; len];
        let shared = Shared::new(&mut out);
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

    #[test]
    fn every_row_is_computed_once_whoever_computes_it() {
        let isa = Isa::detect();
        let (x, weight) = (waves(50 * WIDTH), waves(WIDTH));
        let given = Shared::read_only(&x);
        // SAFETY: nobody else has the buffers.
        let normed = run(50 * WIDTH, |team, out| unsafe {
            rms_norm(team, isa, given, 50, &weight, 1e-5, out, None);
        });
        let mut one = vec![0.0; WIDTH];
        for (row, found) in x.chunks(WIDTH).zip(normed.chunks(WIDTH)) {
            let norm = RmsNorm {
                x: row,
                weight: &weight,
                eps: 1e-5,
                out: &mut one,
            };
            dispatch(isa, norm);
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
        // SAFETY: as above.
        let means = run(2 * WIDTH, |team, out| unsafe {
            pool(team, given, WIDTH, &[0, 1, 50], out);
        });
        pool_mean(&x[WIDTH..], &mut one);
        assert_eq!(means[WIDTH..], one);
        let table = layer(50, WIDTH, Format::F32);
        // SAFETY: as above.
        let embedded = run(20 * WIDTH, |team, out| unsafe {
            embed(team, &table, &chosen, out);
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
            let (inner, inner_again) = (Shared::new(&mut inner), Shared::new(&mut inner_again));
            let (first, second) = (Shared::new(first), Shared::new(second));
            let (a, b) = (Shared::new(&mut a), Shared::new(&mut b));
            let (x, gate_up) = (Shared::read_only(&x), Shared::read_only(&gate_up));
            let write = |team: &Team, residual, out, quantized: Option<&QuantizedRows>| {
                // SAFETY: nobody else has the buffers.
                unsafe {
                    match way {
                        0 => rms_norm(team, isa, x, rows, &weight, 1e-5, out, quantized),
                        1 => add_rms_norm(
                            team, isa, x, residual, rows, &weight, 1e-5, out, quantized,
                        ),
                        _ => silu_mul(team, isa, gate_up, rows, WIDTH, out, quantized),
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
    fn tokens_are_rotated_by_their_position_and_stored_at_their_slot() {
        let shape = KvShape {
            dtype: KvType::F32,
            kv_heads: 2,
            head_dim: 8,
        };
        let mut cache = KvCache::new(shape, 2, 3);
        let tables = waves(20 * 4);
        let (positions, slots) = ([3, 19, 0, 7], [40, 1, 17, 5]);
        let width = (4 + 2 * 2) * 8;
        let given = waves(4 * width);
        let rope = RopeAndCache {
            heads: 4,
            cos: &tables,
            sin: &tables,
            q_norm: None,
            k_norm: None,
            eps: 1e-5,
            cache: cache.view(),
            layer: 1,
        };
        let rotated = run(4 * width, |team, qkv| {
            if team.index() == 0 {
                // SAFETY: the others wait at the barrier.
                unsafe { qkv.get_mut(0..4 * width) }.copy_from_slice(&given);
            }
            team.barrier();
            // SAFETY: nobody else has the buffers, and the slots differ.
            unsafe { rope.run(team, Isa::detect(), qkv, &positions, &slots) };
        });
        for token in 0..4 {
            let (row, raw) = (&rotated[token * width..], &given[token * width..]);
            let angle = tables[positions[token] as usize * 4];
            assert!((row[0] - (raw[0] - raw[4]) * angle).abs() < 1e-6);
            let stored = rope.cache.page_rows(1, slots[token] as usize, 1);
            assert_eq!(stored.0, row[5 * 8..6 * 8]);
            assert_eq!(stored.1, raw[7 * 8..8 * 8]);
        }
    }
}
