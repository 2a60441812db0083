//! Computes the experts of a layer for a step's rows.

use super::groups::{BLOCK, Grouping};
use super::stages::{ExpertScratch, Stages};
use super::weights::ExpertsWeight;
use crate::cpu::activation::Activate;
use crate::cpu::elementwise::AddRow;
use crate::cpu::isa::Isa;
use crate::cpu::linear::Linear;
use crate::cpu::memory::SharedSlice;
use crate::cpu::pool::Team;
use crate::cpu::simd::dispatch;

impl ExpertsWeight {
    /// `out` `[rows, hidden]`: what the chosen experts make of the rows of `x`, weighted and added. `routing` is what
    /// [`RouterWeight::route`] left. Every thread of the team calls it; it ends with a barrier.
    ///
    /// # Safety
    /// Until it returns on all threads, nobody may write `x` and `routing`, and nobody else touch `out` or the scratch memory.
    pub(in crate::cpu) unsafe fn forward(
        &self,
        team: &Team,
        isa: Isa,
        (x, rows): (SharedSlice<f32>, usize),
        (routing, top_k): (SharedSlice<f32>, usize),
        scratch: &ExpertScratch,
        out: SharedSlice<f32>,
    ) {
        let (hidden, inner, width) = (self.hidden, self.inner, 2 * top_k);
        // SAFETY: nobody writes the routing.
        let routing = unsafe { routing.get(0..rows * width) };
        let mut grouping = scratch.grouping(team.index());
        grouping.group(self.count(), (rows, top_k), |row, j| {
            routing[row * width + j] as usize
        });
        let stages = Stages {
            isa,
            scratch,
            rows,
            top_k,
        };
        // SAFETY: a stage writes what no stage before it still reads, each piece by one thread, and ends with a barrier.
        unsafe {
            stages.gather(team, &grouping, (x, hidden), self.inputs);
            grouping.cut(
                1 + usize::from(self.gated),
                Linear::tiles_of(inner),
                team.size(),
            );
            stages.multiply(
                team,
                &grouping,
                stages.gathered(x),
                (hidden, inner),
                |unit, expert| {
                    let expert = &self.experts[expert];
                    match (&expert.gate, unit.matrix) {
                        (Some(gate), 1) => (gate, scratch.gate),
                        _ => (&expert.up, scratch.up),
                    }
                },
            );
            let blocks = grouping.blocks.len();
            team.for_chunks(blocks, blocks / (4 * team.size()), |range| {
                for &(group, first) in &grouping.blocks[range] {
                    self.activate(
                        &stages,
                        &grouping,
                        (group as usize, first as usize),
                        routing,
                    );
                    if self.inners.integers {
                        stages.quantize(&grouping, (group as usize, first as usize), inner);
                    }
                }
            });
            grouping.cut(1, Linear::tiles_of(hidden), team.size());
            stages.multiply(
                team,
                &grouping,
                (scratch.inner, false),
                (inner, hidden),
                |_, expert| (&self.experts[expert].down, scratch.outputs),
            );
            team.for_chunks(rows, (rows / (4 * team.size())).min(16), |range| {
                for row in range {
                    self.combine(&stages, &grouping, row, routing, out);
                }
            });
        }
    }

    /// Applies the activation to a block of a group's rows, between the matrices.
    ///
    /// # Safety
    /// The products with gate and up are written; nobody else touches this block.
    unsafe fn activate(
        &self,
        stages: &Stages,
        grouping: &Grouping,
        (group, first): (usize, usize),
        routing: &[f32],
    ) {
        let (group, inner, top_k) = (grouping.groups[group], self.inner, stages.top_k);
        for row in first..group.rows.min(first + BLOCK) {
            let place = group.first + row;
            let at = place * inner..(place + 1) * inner;
            // SAFETY: the caller's promise; without a gate its buffer is of no size.
            let (gate, up, out) = unsafe {
                let gate = if self.gated { at.clone() } else { 0..0 };
                (
                    stages.scratch.gate.get_mut(gate),
                    stages.scratch.up.get_mut(at.clone()),
                    stages.scratch.inner.get_mut(at),
                )
            };
            if self.scaled_inputs {
                let pair = grouping.pairs[place] as usize;
                let weight = routing[pair / top_k * 2 * top_k + top_k + pair % top_k];
                for x in gate.iter_mut().chain(up.iter_mut()) {
                    *x *= weight;
                }
            }
            let (x, factor) = if self.gated {
                (&*gate, Some(&*up))
            } else {
                (&*up, None)
            };
            let activate = Activate {
                activation: self.activation,
                x,
                factor,
                out,
            };
            dispatch(stages.isa, activate);
        }
    }

    /// Adds the outputs of a row's experts, in the order of its choice.
    ///
    /// # Safety
    /// All of it is written; nobody else touches this row of `out`.
    unsafe fn combine(
        &self,
        stages: &Stages,
        grouping: &Grouping,
        row: usize,
        routing: &[f32],
        out: SharedSlice<f32>,
    ) {
        let (hidden, top_k) = (self.hidden, stages.top_k);
        // SAFETY: the caller's promise.
        let out = unsafe { out.get_mut(row * hidden..(row + 1) * hidden) };
        out.fill(0.0);
        let weights = &routing[row * 2 * top_k + top_k..(row + 1) * 2 * top_k];
        for (j, &weight) in weights.iter().enumerate() {
            let place = grouping.places[row * top_k + j] as usize;
            let at = place * hidden..(place + 1) * hidden;
            let add = AddRow {
                // SAFETY: the caller's promise.
                x: unsafe { stages.scratch.outputs.get(at) },
                scale: if self.scaled_inputs { 1.0 } else { weight },
                residual: out,
            };
            dispatch(stages.isa, add);
        }
    }
}
