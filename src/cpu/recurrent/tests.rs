//! The kernels against plain loops, in any cut, for each instruction set.

use super::super::Isa;
use super::super::memory::SharedSlice;
use super::super::simd::dispatch;
use super::conv::{ConvGate, ConvTokens, ConvWeight};
use super::scan::{COLUMNS, ScanRule, ScanTokens, ScanWeight, TokenRows};
use super::state::RecurrentShape;

fn wave(len: usize, speed: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * speed).sin()).collect()
}

/// What a convolution gives for all tokens, from zeros.
fn plain_conv(weight: &[f32], bias: &[f32], kernel: usize, gate: ConvGate, x: &[f32]) -> Vec<f32> {
    let channels = weight.len() / kernel;
    let width = if gate == ConvGate::Inputs {
        3 * channels
    } else {
        channels
    };
    let tokens = x.len() / width;
    let input = |token: usize, channel: usize| {
        let row = &x[token * width..(token + 1) * width];
        match gate {
            ConvGate::Inputs => row[channel] * row[2 * channels + channel],
            _ => row[channel],
        }
    };
    let mut out = Vec::new();
    for token in 0..tokens {
        for channel in 0..channels {
            let mut sum = bias[channel];
            for back in 0..kernel.min(token + 1) {
                sum += weight[channel * kernel + kernel - 1 - back] * input(token - back, channel);
            }
            out.push(match gate {
                ConvGate::None => sum,
                ConvGate::Silu => sum / (1.0 + (-sum).exp()),
                ConvGate::Inputs => x[token * width + channels + channel] * sum,
            });
        }
    }
    out
}

/// The same by the kernel, in steps of so many tokens; every other step writes its state to another slot.
fn conv_in_steps(
    isa: Isa,
    weight: &ConvWeight,
    gate: ConvGate,
    x: &[f32],
    steps: &[usize],
) -> Vec<f32> {
    let channels = weight.channels;
    let width = if gate == ConvGate::Inputs {
        3 * channels
    } else {
        channels
    };
    let mut x = x.to_vec();
    let mut out = vec![f32::NAN; x.len() / width * channels];
    let mut slots = [
        vec![f32::NAN; channels * (weight.kernel - 1)],
        vec![f32::NAN; channels * (weight.kernel - 1)],
    ];
    let (mut first, mut own) = (0, 0);
    for (step, &tokens) in steps.iter().enumerate() {
        let to = (own + step) % 2;
        let states = slots.each_mut().map(|slot| SharedSlice::new(slot));
        for part in [0..channels / 2, channels / 2..channels] {
            dispatch(
                isa,
                ConvTokens {
                    weight,
                    gate,
                    channels: part,
                    x: SharedSlice::new(&mut x).part(first * width..(first + tokens) * width),
                    x_stride: width,
                    tokens,
                    from: (step > 0).then_some(states[own]),
                    to: states[to],
                    out: SharedSlice::new(&mut out)
                        .part(first * channels..(first + tokens) * channels),
                },
            );
        }
        first += tokens;
        own = to;
    }
    out
}

#[test]
fn convolutions_are_those_of_plain_loops_and_the_same_to_the_bit_in_any_cut() {
    for (channels, kernel) in [(48, 3), (37, 4), (5, 2), (16, 1)] {
        let (weight, bias) = (wave(channels * kernel, 0.7), wave(channels, 0.3));
        let packed = ConvWeight::new(&weight, Some(bias.clone()), kernel);
        for gate in [ConvGate::None, ConvGate::Silu, ConvGate::Inputs] {
            let width = if gate == ConvGate::Inputs { 3 } else { 1 } * channels;
            let x = wave(11 * width, 0.11);
            let expected = plain_conv(&weight, &bias, kernel, gate, &x);
            for isa in Isa::available() {
                let whole = conv_in_steps(isa, &packed, gate, &x, &[11]);
                for (found, expected) in whole.iter().zip(&expected) {
                    assert!((found - expected).abs() < 1e-5, "{} {gate:?}", isa.name());
                }
                for steps in [&[1; 11][..], &[4, 1, 1, 5], &[2, 9], &[1, 2, 3, 4, 1]] {
                    let cut = conv_in_steps(isa, &packed, gate, &x, steps);
                    let same = whole
                        .iter()
                        .zip(&cut)
                        .all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{} {gate:?} {steps:?}", isa.name());
                }
            }
        }
    }
}

const DELTA: ScanRule = ScanRule::Delta { tiled: false };
const TILED: ScanRule = ScanRule::Delta { tiled: true };

const fn scan_shape(heads: usize, rows: usize, columns: usize) -> RecurrentShape {
    RecurrentShape {
        channels: 1,
        kernel: 1,
        heads,
        rows,
        columns,
    }
}

/// The part of a row of queries or keys that belongs to a head, in double precision.
fn of_head(row: &[f32], group: usize, rows: usize, scale: Option<f64>) -> Vec<f64> {
    let own: Vec<f64> = row[group * rows..(group + 1) * rows]
        .iter()
        .map(|x| f64::from(*x))
        .collect();
    let Some(scale) = scale else { return own };
    let length = (own.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
    own.iter().map(|x| x / length * scale).collect()
}

/// What a recurrence gives for all tokens, from zeros, token by token in double precision.
fn plain_scan(
    shape: RecurrentShape,
    groups: usize,
    rule: ScanRule,
    weight: &ScanWeight,
    (x, gates): (&[f32], &[f32]),
) -> Vec<f32> {
    let (heads, rows, columns) = (shape.heads, shape.rows, shape.columns);
    let (inner, keys) = (heads * columns, groups * rows);
    let delta = rule != ScanRule::Mamba;
    let gate_width = if delta { 2 * heads } else { heads };
    let tokens = gates.len() / gate_width;
    let mut out = vec![0.0; tokens * inner];
    for head in 0..heads {
        let group = match rule {
            TILED => head % groups,
            _ => head / (heads / groups),
        };
        let mut state = vec![0.0_f64; rows * columns];
        for token in 0..tokens {
            let row = &x[token * (2 * keys + inner)..(token + 1) * (2 * keys + inner)];
            let gate = &gates[token * gate_width..(token + 1) * gate_width];
            let (query, key, value) = if delta {
                let scale = 1.0 / (rows as f64).sqrt();
                (
                    of_head(row, group, rows, Some(scale)),
                    of_head(&row[keys..], group, rows, Some(1.0)),
                    &row[2 * keys + head * columns..],
                )
            } else {
                (
                    of_head(&row[inner + keys..], group, rows, None),
                    of_head(&row[inner..], group, rows, None),
                    &row[head * columns..],
                )
            };
            let given = gate[if delta { heads + head } else { head }];
            let step = (f64::from(given) + f64::from(weight.bias[head]))
                .exp()
                .ln_1p();
            let step = step.clamp(weight.limits.0.into(), weight.limits.1.into());
            let decay = (f64::from(weight.decay[head]) * step).exp();
            let beta = if delta {
                1.0 / (1.0 + (-f64::from(gate[head])).exp())
            } else {
                step
            };
            let skip = weight
                .skip
                .as_ref()
                .map_or(0.0, |skip| f64::from(skip[head]));
            for column in 0..columns {
                let cells = || (0..rows).map(|row| row * columns + column);
                cells().for_each(|cell| state[cell] *= decay);
                let value = f64::from(value[column]);
                let known: f64 = cells().zip(&key).map(|(cell, k)| state[cell] * k).sum();
                let change = beta * if delta { value - known } else { value };
                for (cell, k) in cells().zip(&key) {
                    state[cell] += k * change;
                }
                let found: f64 = cells().zip(&query).map(|(cell, q)| state[cell] * q).sum();
                out[token * inner + head * columns + column] = (skip.mul_add(value, found)) as f32;
            }
        }
    }
    out
}

/// The same by the kernel, in steps of so many tokens; every other step writes its state to another slot.
fn scan_in_steps(
    isa: Isa,
    (shape, groups, rule): (RecurrentShape, usize, ScanRule),
    weight: &ScanWeight,
    (x, gates): (&[f32], &[f32]),
    steps: &[usize],
) -> Vec<f32> {
    let (mut x, mut gates) = (x.to_vec(), gates.to_vec());
    let inner = shape.heads * shape.columns;
    let gate_width = shape.heads * if rule == ScanRule::Mamba { 1 } else { 2 };
    let width = 2 * groups * shape.rows + inner;
    let mut out = vec![f32::NAN; x.len() / width * inner];
    let matrix = shape.rows * shape.columns;
    let mut slots = [0, 1].map(|_| vec![f32::NAN; shape.heads * matrix]);
    let (mut first, mut own) = (0, 0);
    for (step, &tokens) in steps.iter().enumerate() {
        let to = (own + step) % 2;
        let states = slots.each_mut().map(|slot| SharedSlice::new(slot));
        for head in 0..shape.heads {
            let of = |slot: usize| states[slot].part(head * matrix..(head + 1) * matrix);
            for start in (0..shape.columns).step_by(COLUMNS) {
                let kernel = ScanTokens {
                    rule,
                    weight,
                    shape,
                    groups,
                    head,
                    columns: start..shape.columns.min(start + COLUMNS),
                    x: TokenRows {
                        values: SharedSlice::new(&mut x)
                            .part(first * width..(first + tokens) * width),
                        stride: width,
                    },
                    gates: TokenRows {
                        values: SharedSlice::new(&mut gates)
                            .part(first * gate_width..(first + tokens) * gate_width),
                        stride: gate_width,
                    },
                    tokens,
                    from: (step > 0).then(|| of(own)),
                    to: of(to),
                    out: SharedSlice::new(&mut out).part(first * inner..(first + tokens) * inner),
                };
                dispatch(isa, kernel);
            }
        }
        first += tokens;
        own = to;
    }
    out
}

#[test]
fn recurrences_are_those_of_plain_loops_and_the_same_to_the_bit_in_any_cut() {
    for (heads, groups, rows, columns) in [
        (4, 2, 16, 24),
        (3, 3, 5, 7),
        (6, 2, 128, 128),
        (2, 1, 12, 65),
    ] {
        let shape = scan_shape(heads, rows, columns);
        for rule in [DELTA, TILED, ScanRule::Mamba] {
            let mamba = rule == ScanRule::Mamba;
            let weight = ScanWeight {
                decay: wave(heads, 0.9).iter().map(|x| -x.abs() - 0.05).collect(),
                bias: wave(heads, 0.4),
                skip: mamba.then(|| wave(heads, 1.3)),
                limits: if mamba {
                    (0.1, 1.2)
                } else {
                    (0.0, f32::INFINITY)
                },
            };
            let x = wave(11 * (2 * groups * rows + heads * columns), 0.37);
            let gates = wave(11 * heads * if mamba { 1 } else { 2 }, 1.7);
            let expected = plain_scan(shape, groups, rule, &weight, (&x, &gates));
            for isa in Isa::available() {
                let run = |steps: &[usize]| {
                    scan_in_steps(isa, (shape, groups, rule), &weight, (&x, &gates), steps)
                };
                let whole = run(&[11]);
                let size = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                for (found, expected) in whole.iter().zip(&expected) {
                    assert!(
                        (found - expected).abs() < 1e-5 * size,
                        "{} {rule:?}",
                        isa.name()
                    );
                }
                for steps in [&[1; 11][..], &[4, 1, 1, 5], &[2, 9], &[1, 2, 3, 4, 1]] {
                    let cut = run(steps);
                    let same = whole
                        .iter()
                        .zip(&cut)
                        .all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{} {rule:?} {steps:?}", isa.name());
                }
            }
        }
    }
}
