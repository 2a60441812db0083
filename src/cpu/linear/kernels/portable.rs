//! Plain loops that every machine can run, and that the other kernels are tested against.

use std::ops::Range;

use super::super::activations::{RECORD, Span, Target};
use super::super::floats::{self, Data};
use super::super::{Format, TILE, integers};
use super::store;
use crate::cpu::half::{bf16_to_f32, f16_to_f32};
use crate::cpu::quant::{Code, GROUP};

/// # Safety
/// The buffers of the task are of the right sizes, nobody writes `x`, and nobody else these tiles and rows of `y`.
pub(super) unsafe fn integers(task: &integers::Task, tiles: Range<usize>, rows: Range<usize>) {
    let weights = task.weights;
    let block = task.x.block();
    for tile in tiles {
        for row in rows.clone() {
            let mut sums = [0.0; TILE];
            for group in 0..weights.groups {
                let at = tile * weights.groups + group;
                let q = &weights.q[at * weights.group_bytes()..][..weights.group_bytes()];
                let scales = &weights.scales[at * weights.scale_bytes()..][..weights.scale_bytes()];
                // SAFETY: the record lies within the rows, which nobody writes.
                let (x, factor, weighted) = unsafe {
                    let record = task
                        .x
                        .block_at(row - row % block)
                        .add(group * RECORD * block);
                    group_of_row(record, block, row % block)
                };
                add_group(weights.code, q, scales, &x, factor, weighted, &mut sums);
            }
            // SAFETY: the caller's promise.
            unsafe { store(&task.output, row, tile, sums) };
        }
    }
}

/// Integers with their zero added, scale, and scale times the integers' sum of one row in a record.
unsafe fn group_of_row(record: *const u8, block: usize, r: usize) -> ([i32; GROUP], f32, f32) {
    let mut x = [0; GROUP];
    // SAFETY: all lie within the record.
    unsafe {
        let tail = record.add(GROUP * block).cast::<f32>();
        let zero = i32::from(tail.add(4 * block + r).cast::<i16>().read());
        for (step, x) in x.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let q = record.add((step * block + r) * 4).cast::<[i8; 4]>().read();
            *x = q.map(|q| i32::from(q) + zero);
        }
        (x, tail.add(r).read(), tail.add(block + r).read())
    }
}

fn add_group(
    code: Code,
    q: &[u8],
    scales: &[u8],
    x: &[i32; GROUP],
    factor: f32,
    weighted: f32,
    sums: &mut [f32; TILE],
) {
    let zero = i32::from(code.zero());
    let scale = |which: usize, o: usize| {
        let at = which * TILE + o;
        if code.wide {
            let b = &scales[4 * at..][..4];
            f32::from_ne_bytes([b[0], b[1], b[2], b[3]])
        } else {
            f16_to_f32(u16::from_ne_bytes([scales[2 * at], scales[2 * at + 1]]))
        }
    };
    let steps = code.group / 4;
    for part in 0..GROUP / code.group {
        let mut dots = [0; TILE];
        for step in part * steps..(part + 1) * steps {
            let x = &x[step * 4..][..4];
            let (line, shift) = if code.bits == 4 {
                (&q[step / 2 * 4 * TILE..][..4 * TILE], step % 2 * 4)
            } else {
                (&q[step * 4 * TILE..][..4 * TILE], 0)
            };
            let mask = if code.bits == 4 { 0x0f } else { 0xff };
            for (dot, w) in dots.iter_mut().zip(line.as_chunks::<4>().0) {
                for (&w, &x) in w.iter().zip(x) {
                    *dot += (i32::from(w >> shift & mask) - zero) * x;
                }
            }
        }
        for (o, sum) in sums.iter_mut().enumerate() {
            *sum += dots[o] as f32 * (scale(part, o) * factor);
        }
    }
    if code.min {
        for (o, sum) in sums.iter_mut().enumerate() {
            *sum += scale(1, o) * weighted;
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
