//! Causal attention over the paged KV cache.
//!
//! The work is cut into units that threads take one after another: short runs of tokens (a decode step) are cut along their
//! context, long ones (a prompt) into tiles of tokens. A row's result is the same to the bit however its step is cut, and
//! whatever else is in the step: see [`block`].
#![allow(
    clippy::inline_always,
    reason = "what is not inlined is compiled without the instructions it is made for"
)]

mod block;
mod cache;
mod unit;

use std::sync::Mutex;

pub use cache::{KvCache, KvShape, KvType, KvView, PAGE};
pub use unit::Sequence;

use super::Isa;
use super::memory::{Aligned, Shared};
use super::pool::Team;
use super::simd::dispatch;
use block::Softmax;
use unit::{Attend, Layer, NARROW_ROWS, SPLIT, Unit, UnitScratch, merge_sums, normalize};

/// Rows of a unit of a long run of tokens: enough for the conversion of keys and values not to count.
const WIDE_ROWS: usize = 96;

/// One sequence's part of a step.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Its blocks.
    pub sequence: Sequence<'a>,
    /// Its first token among the step's.
    pub first_token: usize,
    /// Its tokens in the step, at least one.
    pub tokens: usize,
    /// Its tokens in the cache once the step's are written.
    pub context: usize,
}

/// How a step's attention is cut; the same in every layer.
struct Plan {
    units: Vec<Unit>,
    /// Units that a thread takes at once.
    chunk: usize,
    /// Runs whose splits are to be merged: the first unit of a key-value head, whose further splits follow it.
    merges: Vec<Unit>,
    partial_len: usize,
}

/// The memory of attention, kept from step to step.
pub struct Attention {
    isa: Isa,
    group: usize,
    shape: KvShape,
    plan: Plan,
    partials: Aligned<f32>,
    scratch: Vec<Mutex<UnitScratch>>,
}

impl Attention {
    /// For `heads` query heads over a cache of this shape, on at most `threads` threads.
    pub fn new(isa: Isa, shape: KvShape, heads: usize, threads: usize) -> Self {
        let group = heads / shape.kv_heads;
        let rows = WIDE_ROWS.max(group);
        Self {
            isa,
            group,
            shape,
            plan: Plan {
                units: Vec::new(),
                chunk: 1,
                merges: Vec::new(),
                partial_len: 0,
            },
            partials: Aligned::zeroed(0),
            scratch: (0..threads)
                .map(|_| Mutex::new(UnitScratch::new(rows, shape.head_dim, shape.width())))
                .collect(),
        }
    }

    /// Cuts a step's work; every layer's [`AttentionStep::attend`] then does it.
    pub fn begin<'a>(&'a mut self, runs: &'a [Run<'a>]) -> AttentionStep<'a> {
        let threads = self.scratch.len();
        self.plan = plan(runs, self.shape, self.group, threads);
        if self.partials.len() < self.plan.partial_len {
            self.partials = Aligned::zeroed(self.plan.partial_len.next_power_of_two());
        }
        AttentionStep {
            isa: self.isa,
            group: self.group,
            runs,
            plan: &self.plan,
            partials: Shared::new(&mut self.partials),
            scratch: &self.scratch,
        }
    }
}

/// A step's attention, cut and ready.
pub struct AttentionStep<'a> {
    isa: Isa,
    group: usize,
    runs: &'a [Run<'a>],
    plan: &'a Plan,
    partials: Shared<'a, f32>,
    scratch: &'a [Mutex<UnitScratch>],
}

impl AttentionStep<'_> {
    /// `out` `[tokens, heads * head_dim]` of the queries in rows of `stride`, once the step's keys and values are written.
    ///
    /// Every thread of the team calls it with the same arguments; it ends with a barrier.
    ///
    /// # Safety
    /// Until it returns on all threads, nobody may write the queries or the cache, and nobody else touch `out`.
    ///
    /// # Panics
    /// If a run does not lie within the cache or the arrays.
    pub unsafe fn attend(
        &self,
        team: &Team,
        layer: usize,
        cache: KvView,
        queries: Shared<f32>,
        stride: usize,
        out: Shared<f32>,
    ) {
        let layer = Layer {
            index: layer,
            cache,
            group: self.group,
            queries,
            stride,
            out,
            partials: self.partials,
        };
        let units = &self.plan.units;
        team.for_chunks(units.len(), self.plan.chunk, |range| {
            let mut scratch = self.scratch[team.index()]
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            for at in range.clone() {
                // Threads take turns.
                let next = if at + 1 < range.end {
                    at + 1
                } else {
                    range.end + self.plan.chunk * (team.size() - 1)
                };
                let with_sequence = |unit: &Unit| (*unit, self.runs[unit.sequence].sequence);
                let (unit, sequence) = with_sequence(&units[at]);
                let attend = Attend {
                    layer,
                    unit,
                    sequence,
                    next: units.get(next).map(with_sequence),
                    scratch: &mut scratch,
                };
                dispatch(self.isa, attend);
            }
        });
        if !self.plan.merges.is_empty() {
            team.for_chunks(self.plan.merges.len(), 1, |range| {
                self.plan.merges[range]
                    .iter()
                    .for_each(|unit| merge_splits(&layer, unit));
            });
        }
    }
}

fn plan(runs: &[Run], shape: KvShape, group: usize, threads: usize) -> Plan {
    let mut plan = Plan {
        units: Vec::new(),
        chunk: 1,
        merges: Vec::new(),
        partial_len: 0,
    };
    let mut short = Vec::new();
    for (sequence, run) in runs.iter().enumerate() {
        let rows = run.tokens * group;
        let position = run.context - run.tokens;
        let unit = |kv_head| Unit {
            sequence,
            kv_head,
            first_token: run.first_token,
            first_position: position,
            tokens: run.tokens,
            first_split: 0,
            splits: run.context.div_ceil(SPLIT),
            partial: None,
        };
        if rows <= NARROW_ROWS {
            for kv_head in 0..shape.kv_heads {
                let whole = unit(kv_head);
                if whole.splits == 1 {
                    short.push(whole);
                    continue;
                }
                plan.merges.push(Unit {
                    partial: Some(plan.partial_len),
                    ..whole
                });
                for split in 0..whole.splits {
                    short.push(Unit {
                        first_split: split,
                        splits: 1,
                        partial: Some(plan.partial_len),
                        ..whole
                    });
                    plan.partial_len += rows * (shape.width() + 2);
                }
            }
            continue;
        }
        // Tokens of a unit: what fills its rows, unless that leaves threads without work.
        let most = (WIDE_ROWS / group).max(1);
        let share = (run.tokens * shape.kv_heads).div_ceil(4 * threads);
        let tokens = share.clamp(most.min(1 + most / 4), most);
        // The last tokens see most keys: they come first.
        for first in (0..run.tokens).step_by(tokens).rev() {
            let count = tokens.min(run.tokens - first);
            plan.units.extend((0..shape.kv_heads).map(|kv_head| Unit {
                first_token: run.first_token + first,
                first_position: position + first,
                tokens: count,
                splits: (position + first + count).div_ceil(SPLIT),
                ..unit(kv_head)
            }));
        }
    }
    if plan.units.is_empty() {
        plan.chunk = (short.len() / (16 * threads)).max(1);
    }
    plan.units.extend(short);
    plan
}

/// Merges the splits of `first`, which the units of the same key-value head have left among the partial results.
fn merge_splits(layer: &Layer, first: &Unit) {
    let rows = first.tokens * layer.group;
    let width = layer.cache.shape().width();
    let part_len = layer.partial_len(rows);
    let Some(start) = first.partial else { return };
    // SAFETY: the units that wrote these partial results are done.
    let parts = unsafe {
        layer
            .partials
            .get_mut(start..start + first.splits * part_len)
    };
    let (total, further) = parts.split_at_mut(part_len);
    let (sums, states) = total.split_at_mut(rows * width);
    for row in 0..rows {
        let at = row * width..(row + 1) * width;
        let mut softmax = Softmax::of(&states[2 * row..]);
        for part in further.chunks_exact(part_len) {
            let (ours, theirs) = softmax.merge(Softmax::of(&part[rows * width + 2 * row..]));
            merge_sums(&mut sums[at.clone()], &part[at.clone()], ours, theirs);
        }
        // SAFETY: every run has rows and heads of its own.
        let to = unsafe { layer.out.get_mut(layer.at(first, row, layer.out_stride())) };
        normalize(to, &sums[at], softmax.sum);
    }
}

impl Softmax {
    /// As a unit leaves it in its partial result.
    fn of(state: &[f32]) -> Self {
        Self {
            base: state[0],
            sum: state[1],
        }
    }
}

#[cfg(test)]
mod tests;
