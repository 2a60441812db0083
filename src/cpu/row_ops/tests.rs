//! Each operation against the same done row by row.

use super::*;
use crate::cpu::attention::{KvCache, KvShape, KvType};
use crate::cpu::{Aligned, FloatType, Format, Matrix, Pool, Stored};

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
