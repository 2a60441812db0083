use super::choice::{ExpertNumbers, Router};
use super::router::RouterWeight;
use super::stages::ExpertMemory;
use super::weights::{ExpertMatrices, ExpertsWeight};
use crate::cpu::activation::Activation;
use crate::cpu::isa::Isa;
use crate::cpu::linear::{FloatType, Format, Linear, Matrix, Stored};
use crate::cpu::memory::{Aligned, SharedSlice};
use crate::cpu::pool::Pool;
use crate::cpu::quant::BlockType;

const EXPERTS: usize = 5;
const TOP_K: usize = 3;
const HIDDEN: usize = 256;
const INNER: usize = 512;

fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Bytes of a matrix: floats, or blocks of a type with small scales.
fn bytes(stored: Stored, seed: u64, rows: usize, columns: usize) -> Vec<u8> {
    match stored {
        Stored::Floats(..) => {
            let values = noise(seed, rows * columns);
            values
                .iter()
                .flat_map(|x| (x / 8.0).to_le_bytes())
                .collect()
        }
        Stored::Blocks(block) => {
            let len = rows * columns / block.elements() * block.bytes();
            let values = noise(seed, len);
            let mut bytes: Vec<u8> = values.iter().map(|x| (x * 127.0) as i8 as u8).collect();
            for one in bytes.chunks_exact_mut(block.bytes()) {
                match block {
                    BlockType::MXFP4 => one[0] = 122,
                    BlockType::Q6_K => one[208..].copy_from_slice(&[0x10, 0x03]),
                    BlockType::Q4_K => one[..4].copy_from_slice(&[0x10, 0x08, 0x40, 0x04]),
                    _ => one[..2].copy_from_slice(&[0x10, 0x10]),
                }
            }
            bytes
        }
    }
}

struct Layer {
    weight: ExpertsWeight,
    scaled_inputs: bool,
    activation: Activation,
}

fn layer(isa: Isa, stored: [Stored; 2], activation: Activation, biased: bool) -> Layer {
    let scaled_inputs = activation == Activation::Silu && !biased;
    let gated = activation != Activation::ReluSquared;
    let shapes = [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)];
    let kinds = [stored[0], stored[0], stored[1]];
    let given: Vec<_> = (0..3 * EXPERTS)
        .map(|i| bytes(kinds[i % 3], i as u64 + 7, shapes[i % 3].0, shapes[i % 3].1))
        .collect();
    let biases: Vec<_> = (0..3 * EXPERTS)
        .map(|i| noise(i as u64 + 99, shapes[i % 3].0))
        .collect();
    let matrix = |i: usize| Matrix {
        stored: kinds[i % 3],
        rows: shapes[i % 3].0,
        columns: shapes[i % 3].1,
        bytes: &given[i],
        bias: biased.then_some(biases[i].as_slice()),
    };
    let each: Vec<_> = (0..EXPERTS)
        .map(|e| ExpertMatrices {
            gate: gated.then(|| matrix(3 * e)),
            up: matrix(3 * e + 1),
            down: matrix(3 * e + 2),
        })
        .collect();
    let pool = Pool::new(2);
    let mut weight = ExpertsWeight::new(activation, scaled_inputs);
    weight.extend(isa, &pool, &each[..1]).unwrap();
    weight.extend(isa, &pool, &each[1..]).unwrap();
    Layer {
        weight,
        scaled_inputs,
        activation,
    }
}

/// A choice of different experts for each row, and weights.
fn routing(rows: usize) -> Vec<f32> {
    let weights = noise(3, rows * TOP_K);
    let mut routing = Vec::new();
    for row in 0..rows {
        routing.extend((0..TOP_K).map(|j| ((row * 7 + row / 3 + j * 2) % EXPERTS) as f32));
        routing.extend(weights[row * TOP_K..][..TOP_K].iter().map(|w| w.abs()));
    }
    routing
}

fn forward(threads: usize, isa: Isa, layer: &Layer, x: &[f32], routing: &[f32]) -> Vec<f32> {
    let rows = x.len() / HIDDEN;
    let mut memory = ExpertMemory::default();
    memory.reserve(&layer.weight, rows, TOP_K, threads);
    let mut out = vec![f32::NAN; rows * HIDDEN];
    let (x, routing, to) = (
        SharedSlice::read_only(x),
        SharedSlice::read_only(routing),
        SharedSlice::new(&mut out),
    );
    let scratch = memory.share();
    // SAFETY: nobody else has the buffers.
    Pool::new(threads).run(&|team| unsafe {
        layer
            .weight
            .forward(team, isa, (x, rows), (routing, TOP_K), &scratch, to);
    });
    out
}

/// `x` times the weights of a layer, and its bias, in f64.
fn product(linear: &Linear, x: &[f64]) -> Vec<f64> {
    let zeros = vec![0.0; linear.in_features()];
    let mut bias = vec![0.0; linear.out_features()];
    // SAFETY: nobody else has the buffers.
    unsafe {
        let pool = Pool::new(1);
        let mut scratch = Aligned::zeroed(linear.scratch_bytes(1));
        let (scratch, y) = (SharedSlice::new(&mut scratch), SharedSlice::new(&mut bias));
        let zeros = SharedSlice::read_only(&zeros);
        pool.run(&|team| linear.forward(team, zeros, 1, y, scratch));
    }
    let mut row = vec![0.0; linear.in_features()];
    let each = bias.iter().enumerate().map(|(i, &bias)| {
        linear.dequantize_row(i, &mut row);
        let dot: f64 = row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
        dot + f64::from(bias)
    });
    each.collect()
}

fn exact(layer: &Layer, x: &[f32], routing: &[f32]) -> Vec<f64> {
    let mut out = Vec::new();
    for (x, routing) in x.chunks(HIDDEN).zip(routing.chunks(2 * TOP_K)) {
        let mut sum = vec![0.0; HIDDEN];
        for j in 0..TOP_K {
            let expert = &layer.weight.experts[routing[j] as usize];
            let weight = f64::from(routing[TOP_K + j]);
            let (before, after) = if layer.scaled_inputs {
                (weight, 1.0)
            } else {
                (1.0, weight)
            };
            let x: Vec<f64> = x.iter().map(|&x| f64::from(x) * before).collect();
            let up = product(&expert.up, &x);
            let gate = expert
                .gate
                .as_ref()
                .map_or(vec![], |gate| product(gate, &x));
            let gate = if gate.is_empty() { &up } else { &gate };
            let inner = gate.iter().zip(&up).map(|(&g, &u)| match layer.activation {
                Activation::ReluSquared => g.max(0.0).powi(2),
                Activation::ClampedSwiglu { alpha, limit } => {
                    let (limit, g) = (f64::from(limit), g.min(f64::from(limit)));
                    g / (1.0 + (-f64::from(alpha) * g).exp()) * (u.clamp(-limit, limit) + 1.0)
                }
                _ => g / (1.0 + (-g).exp()) * u,
            });
            let inner: Vec<f64> = inner.collect();
            for (sum, y) in sum.iter_mut().zip(product(&expert.down, &inner)) {
                *sum += y * after;
            }
        }
        out.extend(sum);
    }
    out
}

fn floats(format: Format) -> Stored {
    Stored::Floats(FloatType::F32, format)
}

const SWIGLU: Activation = Activation::ClampedSwiglu {
    alpha: 1.702,
    limit: 1.0,
};

#[test]
fn rows_pass_the_experts_that_were_chosen_for_them() {
    let kinds = [
        ([floats(Format::F32); 2], Activation::Silu, false),
        ([floats(Format::F32); 2], SWIGLU, true),
        ([floats(Format::Bf16), floats(Format::Int8)], SWIGLU, true),
        (
            [floats(Format::Int8), floats(Format::F32)],
            Activation::Silu,
            true,
        ),
        ([floats(Format::F32); 2], Activation::ReluSquared, true),
        (
            [
                Stored::Blocks(BlockType::Q4_K),
                Stored::Blocks(BlockType::Q6_K),
            ],
            Activation::ReluSquared,
            false,
        ),
        ([Stored::Blocks(BlockType::MXFP4); 2], SWIGLU, true),
        (
            [
                Stored::Blocks(BlockType::Q4_K),
                Stored::Blocks(BlockType::Q6_K),
            ],
            Activation::Silu,
            false,
        ),
        (
            [
                Stored::Blocks(BlockType::Q8_0),
                Stored::Blocks(BlockType::Q4_0),
            ],
            Activation::Silu,
            true,
        ),
    ];
    let x = noise(1, 9 * HIDDEN);
    let routing = routing(9);
    for isa in Isa::available() {
        for (stored, activation, biased) in kinds {
            let layer = layer(isa, stored, activation, biased);
            let found = forward(2, isa, &layer, &x, &routing);
            let expected = exact(&layer, &x, &routing);
            let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
            let error: Vec<f64> = found
                .iter()
                .zip(&expected)
                .map(|(&x, y)| f64::from(x) - y)
                .collect();
            // Activations have 8 bits where weights are integers.
            let exact = stored == [floats(Format::F32); 2];
            let limit = if exact { 1e-6 } else { 0.02 };
            let relative = norm(&error) / norm(&expected);
            assert!(relative < limit, "{} {stored:?}: {relative}", isa.name());
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_in_any_batch_and_on_any_threads() {
    let kinds = [
        [floats(Format::F32); 2],
        [floats(Format::F16), Stored::Blocks(BlockType::Q6_K)],
        [Stored::Blocks(BlockType::MXFP4); 2],
        [
            Stored::Blocks(BlockType::Q4_K),
            Stored::Blocks(BlockType::Q6_K),
        ],
    ];
    let x = noise(2, 150 * HIDDEN);
    let routing = routing(150);
    for isa in Isa::available() {
        for stored in kinds {
            let activation = if stored == [floats(Format::F32); 2] {
                Activation::ReluSquared
            } else {
                SWIGLU
            };
            let layer = layer(isa, stored, activation, true);
            let together = forward(3, isa, &layer, &x, &routing);
            for (first, count) in [(0, 1), (7, 1), (149, 1), (3, 2), (20, 5), (40, 64)] {
                let rows = first * HIDDEN..(first + count) * HIDDEN;
                let routing = &routing[first * 2 * TOP_K..(first + count) * 2 * TOP_K];
                for threads in [1, 2] {
                    let some = forward(threads, isa, &layer, &x[rows.clone()], routing);
                    let bits =
                        |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(
                        bits(&some),
                        bits(&together[rows.clone()]),
                        "{} {stored:?}",
                        isa.name()
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_that_is_no_number_harms_no_other() {
    let isa = Isa::detect();
    let router = RouterWeight::new(
        linear(isa, EXPERTS),
        Router::Softmax { normalized: true },
        ExpertNumbers::default(),
        1.0,
        TOP_K,
    )
    .unwrap();
    for stored in [
        [floats(Format::F32); 2],
        [Stored::Blocks(BlockType::MXFP4); 2],
    ] {
        let layer = layer(isa, stored, SWIGLU, true);
        let mut x = noise(4, 6 * HIDDEN);
        let expected = forward(2, isa, &layer, &x, &route(&router, &x));
        x[2 * HIDDEN + 9] = f32::NAN;
        let found = forward(2, isa, &layer, &x, &route(&router, &x));
        for row in 0..6 {
            let at = row * HIDDEN..(row + 1) * HIDDEN;
            if row == 2 {
                assert!(found[at].iter().all(|x| x.is_nan()));
            } else {
                assert_eq!(found[at.clone()], expected[at]);
            }
        }
    }
}

fn linear(isa: Isa, experts: usize) -> Linear {
    let bytes = bytes(floats(Format::F32), 5, experts, HIDDEN);
    let matrix = Matrix {
        stored: floats(Format::F32),
        rows: experts,
        columns: HIDDEN,
        bytes: &bytes,
        bias: None,
    };
    Linear::pack(isa, &Pool::new(1), &[matrix])
        .unwrap()
        .remove(0)
}

fn route(router: &RouterWeight, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / HIDDEN;
    let mut logits = vec![0.0; rows * router.linear.out_features()];
    let mut out = vec![0.0; rows * 2 * router.top_k];
    let (logits, to) = (SharedSlice::new(&mut logits), SharedSlice::new(&mut out));
    let (x, mut none) = (SharedSlice::read_only(x), Aligned::zeroed(0));
    let none = SharedSlice::new(&mut none);
    // SAFETY: nobody else has the buffers.
    Pool::new(2).run(&|team| unsafe { router.route(team, (x, rows), logits, to, none) });
    out
}

#[test]
fn matrices_that_do_not_fit_and_choices_that_cannot_be_made_are_refused() {
    let isa = Isa::detect();
    let pool = Pool::new(1);
    let bytes = bytes(floats(Format::F32), 5, 16, 32);
    let matrix = |rows, columns| Matrix {
        stored: floats(Format::F32),
        rows,
        columns,
        bytes: &bytes,
        bias: None,
    };
    let pack = |gate, down| {
        let expert = |gate| ExpertMatrices {
            gate,
            up: matrix(16, 32),
            down,
        };
        let experts = [expert(Some(matrix(16, 32))), expert(gate)];
        ExpertsWeight::new(Activation::Silu, false).extend(isa, &pool, &experts)
    };
    assert!(pack(Some(matrix(16, 32)), matrix(32, 16)).is_ok());
    for (gate, down) in [
        (Some(matrix(16, 32)), matrix(16, 32)),
        (Some(matrix(32, 16)), matrix(32, 16)),
        (None, matrix(32, 16)),
    ] {
        let error = pack(gate, down).unwrap_err();
        assert!(error.message.contains("those of shape [16, 32]"), "{error}");
    }
    for (groups, top_groups, top_k) in [(1, 1, 9), (3, 1, 1), (4, 5, 1), (4, 1, 3), (1, 1, 0)] {
        let router = Router::GroupedSoftmax { groups, top_groups };
        let none = ExpertNumbers::default();
        let error = RouterWeight::new(linear(isa, 8), router, none, 1.0, top_k);
        let error = error.map(|_| ()).unwrap_err();
        assert!(error.message.contains("of 8 experts"), "{error}");
    }
}
