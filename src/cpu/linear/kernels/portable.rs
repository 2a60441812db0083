//! Plain loops that every machine can run, and that the other kernels are tested against.

use std::ops::Range;

use super::super::floats::{self, Data};
use super::super::integers::{self, IntWeights};
use super::super::record::{RECORD, Span, Target};
use super::super::{Format, TILE};
use super::store;
use crate::cpu::half::{bf16_to_f32, f16_to_f32};
use crate::cpu::quant::{Code, GROUP};

/// # Safety
/// The buffers of the task are of the right sizes, nobody writes `x`, and nobody else these tiles and rows of `y`.
pub(super) unsafe fn integers(task: &integers::Task, tiles: Range<usize>, rows: Range<usize>) {
    let weights = task.weights;
    let block = task.x.block();
    for tile in tiles {
        let mut sums = vec![[0.0; TILE]; rows.len()];
        for group in 0..weights.groups {
            let outputs: [Group; TILE] =
                std::array::from_fn(|o| Group::read(weights, tile * TILE + o, group));
            for (row, sums) in rows.clone().zip(&mut sums) {
                // SAFETY: the record lies within the rows, which nobody writes.
                let x = unsafe {
                    let record = task
                        .x
                        .block_at(row - row % block)
                        .add(group * RECORD * block);
                    group_of_row(record, block, row % block)
                };
                for (output, sum) in outputs.iter().zip(sums) {
                    output.add(weights.code, &x, sum);
                }
            }
        }
        for (row, sums) in rows.clone().zip(sums) {
            // SAFETY: the caller's promise.
            unsafe { store(&task.output, row, tile, sums) };
        }
    }
}

/// What 32 weights of an output are.
struct Group {
    /// Without the zero.
    q: [i32; GROUP],
    scales: [f32; 2],
    mins: [f32; 2],
}

/// What 32 activations are.
struct Inputs {
    /// With their zero added.
    q: [i32; GROUP],
    scale: f32,
    /// Their sum.
    sum: f32,
}

impl Group {
    fn read(weights: &IntWeights, output: usize, group: usize) -> Self {
        let code = weights.code;
        let (mut scales, mut mins) = ([0.0; 2], [0.0; 2]);
        for part in 0..GROUP / code.group {
            scales[part] = weights.scale(output, group, part);
            if code.min {
                mins[part] = weights.min(output, group, part);
            }
        }
        Self {
            q: weights.integers(output, group).map(|q| code.value(q)),
            scales,
            mins,
        }
    }

    fn add(&self, code: Code, x: &Inputs, sum: &mut f32) {
        let parts = self.q.chunks(code.group).zip(x.q.chunks(code.group));
        for (part, (q, inputs)) in parts.enumerate() {
            let dot: i32 = q.iter().zip(inputs).map(|(&q, &x)| q * x).sum();
            *sum += dot as f32 * (self.scales[part] * x.scale);
            if code.min && code.group == GROUP {
                *sum += self.mins[part] * x.sum;
            } else if code.min {
                let inputs: i32 = inputs.iter().sum();
                *sum += self.mins[part] * (x.scale * inputs as f32);
            }
        }
    }
}

/// One row in a record.
unsafe fn group_of_row(record: *const u8, block: usize, r: usize) -> Inputs {
    let mut x = [0; GROUP];
    // SAFETY: all lie within the record.
    unsafe {
        let tail = record.add(GROUP * block).cast::<f32>();
        let zero = i32::from(tail.add(4 * block + r).cast::<i16>().read());
        for (step, x) in x.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let q = record.add((step * block + r) * 4).cast::<[i8; 4]>().read();
            *x = q.map(|q| i32::from(q) + zero);
        }
        Inputs {
            q: x,
            scale: tail.add(r).read(),
            sum: tail.add(block + r).read(),
        }
    }
}

/// # Safety
/// As for [`integers`].
pub(super) unsafe fn floats(task: &floats::Task, tiles: Range<usize>, rows: Range<usize>) {
    for tile in tiles {
        for row in rows.clone() {
            // SAFETY: the row lies within `x`, which nobody writes.
            let x = unsafe { std::slice::from_raw_parts(task.x.add(row * task.cols), task.cols) };
            let range = tile * task.cols * TILE..(tile + 1) * task.cols * TILE;
            let sums = match &task.weights.data {
                Data::Full(data) => dot(&data[range], x, |w| w),
                Data::Half(data) if task.weights.format == Format::Bf16 => {
                    dot(&data[range], x, bf16_to_f32)
                }
                Data::Half(data) => dot(&data[range], x, f16_to_f32),
            };
            // SAFETY: the caller's promise.
            unsafe { store(&task.output, row, tile, sums) };
        }
    }
}

fn dot<T: Copy>(weights: &[T], x: &[f32], widen: impl Fn(T) -> f32) -> [f32; TILE] {
    let mut sums = [0.0; TILE];
    for (line, &x) in weights.as_chunks::<TILE>().0.iter().zip(x) {
        for (sum, &w) in sums.iter_mut().zip(line) {
            *sum += widen(w) * x;
        }
    }
    sums
}

/// # Safety
/// There must be records for all groups, which nobody else touches.
pub(super) unsafe fn quantize(values: &[f32], mut target: Target) {
    for group in values.chunks(GROUP) {
        let mut x = [0.0; GROUP];
        x[..group.len()].copy_from_slice(group);
        let largest = x.iter().fold(0.0, |max: f32, &x| max.max(x));
        let minus_least = x.iter().fold(0.0, |max: f32, &x| max.max(-x));
        let span = Span::new(largest, minus_least);
        let q = x.map(|x| {
            let q = (x * span.inverse).round_ties_even() as i32 - span.zero;
            q.clamp(-128, 127) as i8
        });
        let sum = |q: &[i8]| q.iter().map(|&q| i32::from(q)).sum();
        // SAFETY: the caller's promise.
        unsafe { target.push(&q, span, sum(&q), sum(&q[..GROUP / 2])) };
    }
}
