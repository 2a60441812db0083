//! The kernels against plain loops, in any cut, for each instruction set.

use super::super::Isa;
use super::super::memory::SharedSlice;
use super::super::simd::dispatch;
use super::conv::{ConvGate, ConvTokens, ConvWeight};

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
