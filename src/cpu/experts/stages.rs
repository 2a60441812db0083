//! What the experts of a layer do with a step's rows, stage after stage, and the memory that they do it in.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::groups::{BLOCK, Grouping, Unit, most};
use super::weights::{ExpertsWeight, Reads};
use crate::cpu::isa::Isa;
use crate::cpu::linear::{Input, Linear, QuantizedRows};
use crate::cpu::memory::{Aligned, SharedSlice};
use crate::cpu::pool::Team;

const LINE_BYTES: usize = 64;

/// What experts compute in, kept from step to step.
#[derive(Default)]
pub(in crate::cpu) struct ExpertMemory {
    rows: Aligned<f32>,
    gate: Aligned<f32>,
    up: Aligned<f32>,
    inner: Aligned<f32>,
    outputs: Aligned<f32>,
    records: Aligned<u8>,
    groupings: Vec<Mutex<Grouping>>,
}

impl ExpertMemory {
    /// Makes room for `rows` rows of which each goes to `top_k` of these experts, on so many threads.
    pub(in crate::cpu) fn reserve(
        &mut self,
        experts: &ExpertsWeight,
        rows: usize,
        top_k: usize,
        threads: usize,
    ) {
        let pairs = rows * top_k;
        let Reads { integers, floats } = experts.inputs;
        if floats {
            self.rows.grow(pairs * experts.hidden);
        }
        if experts.gated {
            self.gate.grow(pairs * experts.inner);
        }
        for buffer in [&mut self.up, &mut self.inner] {
            buffer.grow(pairs * experts.inner);
        }
        self.outputs.grow(pairs * experts.hidden);
        let (padded, groups) = most(pairs, experts.count());
        let bytes = |columns| padded * QuantizedRows::bytes(1, columns) + (groups + 1) * LINE_BYTES;
        let inputs = if integers { bytes(experts.hidden) } else { 0 };
        self.records.grow(inputs.max(bytes(experts.inner)));
        self.groupings.resize_with(threads, Mutex::default);
    }

    /// The same, as all threads see it.
    pub(in crate::cpu) fn share(&mut self) -> ExpertScratch<'_> {
        ExpertScratch {
            rows: SharedSlice::new(&mut self.rows),
            gate: SharedSlice::new(&mut self.gate),
            up: SharedSlice::new(&mut self.up),
            inner: SharedSlice::new(&mut self.inner),
            outputs: SharedSlice::new(&mut self.outputs),
            records: SharedSlice::new(&mut self.records),
            groupings: &self.groupings,
        }
    }
}

/// Rows are in the order of the pairs by expert, but for those that a step has.
pub(in crate::cpu) struct ExpertScratch<'a> {
    /// Inputs, for weights that are floats.
    pub(super) rows: SharedSlice<'a, f32>,
    pub(super) gate: SharedSlice<'a, f32>,
    pub(super) up: SharedSlice<'a, f32>,
    /// What lies between the matrices.
    pub(super) inner: SharedSlice<'a, f32>,
    pub(super) outputs: SharedSlice<'a, f32>,
    /// Quantized inputs, then what lies between the matrices.
    records: SharedSlice<'a, u8>,
    groupings: &'a [Mutex<Grouping>],
}

impl ExpertScratch<'_> {
    pub(super) fn grouping(&self, thread: usize) -> MutexGuard<'_, Grouping> {
        self.groupings[thread]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One layer's stages in a step.
pub(super) struct Stages<'a> {
    pub(super) isa: Isa,
    pub(super) scratch: &'a ExpertScratch<'a>,
    pub(super) rows: usize,
    pub(super) top_k: usize,
}

impl<'a> Stages<'a> {
    /// Whether all groups have the same, the only row.
    const fn alone(&self) -> bool {
        self.rows == 1
    }

    /// Where the multiplication finds the inputs as floats, and whether all groups have the same.
    pub(super) fn gathered<'x>(&'x self, x: SharedSlice<'x, f32>) -> (SharedSlice<'x, f32>, bool) {
        if self.alone() {
            (x, true)
        } else {
            (self.scratch.rows, false)
        }
    }

    /// The quantized rows of a group.
    fn records(&self, grouping: &Grouping, group: usize, columns: usize) -> QuantizedRows<'a> {
        let rows = grouping.groups[group].rows;
        let row_bytes = QuantizedRows::bytes(1, columns);
        // The groups before it take less, whatever is lost to alignment.
        let start = grouping.groups[group].padded * row_bytes + group * LINE_BYTES;
        let start = start / LINE_BYTES * LINE_BYTES;
        let end = start + QuantizedRows::bytes(rows, columns);
        QuantizedRows::new(self.scratch.records.part(start..end), rows, columns)
    }

    /// Brings the rows of each group side by side: as integers, as floats, or both. Ends with a barrier.
    ///
    /// # Safety
    /// Nobody may write `x`, and nobody else touch the scratch memory.
    pub(super) unsafe fn gather(
        &self,
        team: &Team,
        grouping: &Grouping,
        (x, columns): (SharedSlice<f32>, usize),
        Reads { integers, floats }: Reads,
    ) {
        if self.alone() {
            if integers {
                // SAFETY: the caller's promise.
                unsafe {
                    let records = self.records(grouping, 0, columns);
                    records.quantize(self.isa, team, x);
                }
            }
            return;
        }
        let blocks = grouping.blocks.len();
        let mut values = vec![0.0; BLOCK * columns];
        team.for_chunks(blocks, blocks / (4 * team.size()), |range| {
            for &(at, first) in &grouping.blocks[range] {
                let (group, first) = (grouping.groups[at as usize], first as usize);
                let rows = first..group.rows.min(first + BLOCK);
                for (row, to) in rows.clone().zip(values.chunks_exact_mut(columns)) {
                    let from = grouping.pairs[group.first + row] as usize / self.top_k;
                    // SAFETY: the caller's promise.
                    to.copy_from_slice(unsafe { x.get(from * columns..(from + 1) * columns) });
                }
                let values = &values[..rows.len() * columns];
                if floats {
                    let to = (group.first + first) * columns;
                    // SAFETY: each block is one thread's.
                    let to = unsafe { self.scratch.rows.get_mut(to..to + values.len()) };
                    to.copy_from_slice(values);
                }
                if integers {
                    let records = self.records(grouping, at as usize, columns);
                    // SAFETY: each block is one thread's.
                    unsafe { records.set_rows(self.isa, rows, values) };
                }
            }
        });
    }

    /// Quantizes a block of a group's rows of what lies between the matrices.
    ///
    /// # Safety
    /// They are written, and nobody else touches their records.
    pub(super) unsafe fn quantize(
        &self,
        grouping: &Grouping,
        (at, first): (usize, usize),
        columns: usize,
    ) {
        let group = grouping.groups[at];
        let rows = first..group.rows.min(first + BLOCK);
        let values = (group.first + rows.start) * columns..(group.first + rows.end) * columns;
        // SAFETY: the caller's promise.
        unsafe {
            let values = self.scratch.inner.get(values);
            self.records(grouping, at, columns)
                .set_rows(self.isa, rows, values);
        }
    }

    /// Multiplies each group's rows, which `floats` has too (all groups' one row where it is `one`), with its expert's matrices,
    /// which `of` gives with the place of the products. Ends with a barrier.
    ///
    /// # Safety
    /// The rows are written, and nobody else touches the products.
    pub(super) unsafe fn multiply<'w>(
        &self,
        team: &Team,
        grouping: &Grouping,
        (floats, one): (SharedSlice<f32>, bool),
        (columns, outputs): (usize, usize),
        of: impl Fn(&Unit, usize) -> (&'w Linear, SharedSlice<'a, f32>),
    ) {
        team.for_chunks(grouping.units.len(), 1, |range| {
            for unit in &grouping.units[range] {
                let group = grouping.groups[unit.group];
                let (linear, y) = of(unit, group.expert);
                let y = y.part(group.first * outputs..(group.first + group.rows) * outputs);
                let (at, first) = if one {
                    (0, 0)
                } else {
                    (unit.group, group.first)
                };
                let input = if linear.is_quantized() {
                    Input::Integers(self.records(grouping, at, columns))
                } else {
                    Input::Floats(floats.part(first * columns..(first + group.rows) * columns))
                };
                // SAFETY: the caller's promise; the units are disjoint.
                unsafe { linear.forward_part(input, y, unit.tiles.clone(), unit.rows.clone()) };
            }
        });
    }
}
