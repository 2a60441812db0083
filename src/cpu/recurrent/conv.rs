//! Causal convolutions of each channel over the last tokens.

use std::ops::Range;

use super::super::activation::silu;
use super::super::memory::SharedSlice;
use super::super::simd::{Kernel, Simd};
use super::lanes::{load_lanes, store_lanes};

/// Most tokens that a convolution may see.
pub(super) const MAX_KERNEL: usize = 8;
/// Channels that a thread takes at once, all tokens of a sequence with them.
pub(super) const CHANNELS: usize = 128;

/// The weights of a convolution.
pub(in super::super) struct ConvWeight {
    pub(super) channels: usize,
    pub(super) kernel: usize,
    /// `[kernel][channels]`, that of the oldest token first.
    taps: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl ConvWeight {
    /// From `[channels][kernel]`.
    pub(super) fn new(weight: &[f32], bias: Option<Vec<f32>>, kernel: usize) -> Self {
        let channels = weight.len() / kernel;
        let mut taps = vec![0.0; weight.len()];
        for (channel, of_channel) in weight.chunks_exact(kernel).enumerate() {
            for (tap, &value) in of_channel.iter().enumerate() {
                taps[tap * channels + channel] = value;
            }
        }
        Self {
            channels,
            kernel,
            taps,
            bias,
        }
    }

    pub(in super::super) fn bytes(&self) -> usize {
        (self.taps.len() + self.bias.as_ref().map_or(0, Vec::len)) * size_of::<f32>()
    }
}

/// What is done around a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConvGate {
    /// Nothing.
    None,
    /// `silu` of what it gives.
    Silu,
    /// Its rows are `b | c | x`, all as wide as there are channels: `c * conv(b * x)`.
    Inputs,
}

/// The convolution of one sequence's tokens in some channels; it leaves the state behind them.
pub(super) struct ConvTokens<'a> {
    pub(super) weight: &'a ConvWeight,
    pub(super) gate: ConvGate,
    pub(super) channels: Range<usize>,
    /// The sequence's rows.
    pub(super) x: SharedSlice<'a, f32>,
    pub(super) x_stride: usize,
    pub(super) tokens: usize,
    /// `[kernel - 1][channels]`; `None`: zeros.
    pub(super) from: Option<SharedSlice<'a, f32>>,
    /// May be the same memory.
    pub(super) to: SharedSlice<'a, f32>,
    /// The sequence's rows of `channels`.
    pub(super) out: SharedSlice<'a, f32>,
}

/// Where the input of a token before the current one is.
#[derive(Clone, Copy)]
enum Past {
    Row(usize),
    State(usize),
    Zero,
}

impl ConvTokens<'_> {
    /// The input at `time`, counted from the sequence's first token of the step.
    fn past(&self, time: isize) -> Past {
        match usize::try_from(time) {
            Ok(row) => Past::Row(row * self.x_stride),
            Err(_) if self.from.is_some() => {
                let row = time + self.weight.kernel as isize - 1;
                Past::State(row as usize * self.weight.channels)
            }
            Err(_) => Past::Zero,
        }
    }

    /// `n` lanes of an input from channel `at` on.
    #[inline(always)]
    fn input<S: Simd>(&self, s: S, past: Past, at: usize, n: usize) -> S::V {
        // SAFETY: rows and state were written before the last barrier, and of the state nobody else touches these channels.
        unsafe {
            match past {
                Past::Row(row) if self.gate == ConvGate::Inputs => {
                    let row = self.x.as_ptr().add(row + at);
                    let x = load_lanes(s, row.add(2 * self.weight.channels), n);
                    s.mul(load_lanes(s, row, n), x)
                }
                Past::Row(row) => load_lanes(s, self.x.as_ptr().add(row + at), n),
                Past::State(row) => match self.from {
                    Some(from) => load_lanes(s, from.as_ptr().add(row + at), n),
                    None => s.splat(0.0),
                },
                Past::Zero => s.splat(0.0),
            }
        }
    }
}

impl Kernel for ConvTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (kernel, width) = (self.weight.kernel, self.weight.channels);
        let (first, end) = (self.channels.start, self.channels.end);
        let before = kernel as isize - 1;
        let mut past = [Past::Zero; MAX_KERNEL];
        for token in 0..self.tokens {
            for (tap, past) in past[..kernel].iter_mut().enumerate() {
                *past = self.past(token as isize - before + tap as isize);
            }
            let mut at = first;
            while at < end {
                let n = S::LANES.min(end - at);
                // SAFETY: weights, rows and outputs have these channels, and the outputs are this thread's.
                unsafe {
                    let mut sum = match &self.weight.bias {
                        Some(bias) => load_lanes(s, bias.as_ptr().add(at), n),
                        None => s.splat(0.0),
                    };
                    let mut tap = 0;
                    while tap < kernel {
                        let weight =
                            load_lanes(s, self.weight.taps.as_ptr().add(tap * width + at), n);
                        sum = s.mul_add(weight, self.input(s, past[tap], at, n), sum);
                        tap += 1;
                    }
                    let y = match self.gate {
                        ConvGate::None => sum,
                        ConvGate::Silu => silu(s, sum),
                        ConvGate::Inputs => {
                            let gate = self.x.as_ptr().add(token * self.x_stride + width + at);
                            s.mul(load_lanes(s, gate, n), sum)
                        }
                    };
                    store_lanes(s, self.out.as_ptr().add(token * width + at), y, n);
                }
                at += S::LANES;
            }
        }
        // The oldest first, so that a state that is moved along in place is read before it is written.
        for row in 0..kernel - 1 {
            let past = self.past(self.tokens as isize - before + row as isize);
            let mut at = first;
            while at < end {
                let n = S::LANES.min(end - at);
                let input = self.input(s, past, at, n);
                // SAFETY: the state has these channels, which are this thread's.
                unsafe { store_lanes(s, self.to.as_ptr().add(row * width + at), input, n) };
                at += S::LANES;
            }
        }
    }
}
