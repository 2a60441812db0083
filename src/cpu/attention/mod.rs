//! Attention over the paged KV cache: causal, or of all tokens of a text among each other.
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
mod distances;
mod unit;

use std::sync::Mutex;

pub use cache::{CacheView, KvCache, KvShape, KvType, KvView, PAGE};
pub use distances::Distances;
pub use unit::Sequence;

use super::Isa;
use super::memory::{Aligned, SharedSlice};
use super::pool::Team;
use super::simd::dispatch;
use block::Softmax;
use block::TILE;
use unit::{Attend, Layer, NARROW_ROWS, SPLIT, Unit, UnitScratch, merge_sums};

/// Number of rows of a unit of a long span: enough that converting keys and values costs little.
const WIDE_ROWS: usize = 96;

/// The tokens of one sequence in a step.
#[derive(Clone, Copy)]
pub struct SeqSpan<'a> {
    /// Its blocks.
    pub sequence: Sequence<'a>,
    /// Its blocks in layers with a sliding window.
    pub window: Sequence<'a>,
    /// Index of its first token in the step.
    pub first_token: usize,
    /// Number of its tokens in the step, at least one.
    pub tokens: usize,
    /// Number of its tokens in the cache after the step's tokens are written.
    pub context: usize,
}

/// What layers must have in common so that their attention is divided into the same units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// The shape of keys and values.
    pub kv: KvShape,
    /// Number of query heads.
    pub heads: usize,
    /// Number of parts into which the query heads of a key-value head are divided. Each part is computed separately. There is more than
    /// one if so many query heads share a key-value head that threads would have no work.
    pub parts: usize,
    /// Number of tokens that a token sees, including itself. `None`: all before it. If it is not causal, this many on each side.
    pub window: Option<usize>,
    /// Whether a token sees only the tokens up to itself. If not, its text must be whole in the step.
    pub causal: bool,
}

impl AttentionShape {
    /// Number of parts for `heads` query heads that share one key-value head: as few as possible, but so many that each part reads
    /// keys and values as they are stored.
    pub fn parts_of(heads: usize) -> usize {
        let fits = |parts: &usize| heads.is_multiple_of(*parts) && heads / parts <= NARROW_ROWS;
        (1..=heads).find(fits).unwrap_or(1)
    }

    /// Parts of all key-value heads.
    const fn all_parts(self) -> usize {
        self.kv.kv_heads * self.parts
    }

    /// Query heads of a part.
    const fn group(self) -> usize {
        self.heads / self.all_parts()
    }
}

/// The division of a step's attention into units. It is the same in every layer of one shape.
#[derive(Default)]
struct Plan {
    units: Vec<Unit>,
    /// Number of units that a thread takes at once.
    chunk: usize,
    /// The parts with several splits that must be merged: the first unit of each. Its further splits follow it.
    merges: Vec<Unit>,
    partial_len: usize,
}

/// The memory of attention, kept from step to step.
pub struct Attention {
    isa: Isa,
    shapes: Vec<AttentionShape>,
    plans: Vec<Plan>,
    partials: Aligned<f32>,
    scratch: Vec<Mutex<UnitScratch>>,
}

impl Attention {
    /// For layers of these shapes, on at most `threads` threads.
    pub fn new(isa: Isa, shapes: &[AttentionShape], threads: usize) -> Self {
        let largest = |of: fn(&AttentionShape) -> usize| shapes.iter().map(of).max().unwrap_or(1);
        let rows = WIDE_ROWS.max(largest(|shape| shape.group()));
        let (head_dim, width) = (
            largest(|shape| shape.kv.head_dim),
            largest(|shape| shape.kv.width()),
        );
        Self {
            isa,
            shapes: shapes.to_vec(),
            plans: Vec::new(),
            partials: Aligned::zeroed(0),
            scratch: (0..threads)
                .map(|_| Mutex::new(UnitScratch::new(rows, head_dim, width)))
                .collect(),
        }
    }

    /// Divides a step's work. [`AttentionStep::attend`] then computes it for each layer.
    pub fn begin<'a>(&'a mut self, spans: &'a [SeqSpan<'a>]) -> AttentionStep<'a> {
        let threads = self.scratch.len();
        let cut = |shape: &AttentionShape| plan(spans, *shape, threads);
        self.plans = self.shapes.iter().map(cut).collect();
        let partial_len = self.plans.iter().map(|plan| plan.partial_len).max();
        let partial_len = partial_len.unwrap_or(0);
        if self.partials.len() < partial_len {
            self.partials = Aligned::zeroed(partial_len.next_power_of_two());
        }
        AttentionStep {
            isa: self.isa,
            shapes: &self.shapes,
            spans,
            plans: &self.plans,
            partials: SharedSlice::new(&mut self.partials),
            scratch: &self.scratch,
        }
    }
}

/// A step's attention, divided into units.
pub struct AttentionStep<'a> {
    isa: Isa,
    shapes: &'a [AttentionShape],
    spans: &'a [SeqSpan<'a>],
    plans: &'a [Plan],
    partials: SharedSlice<'a, f32>,
    scratch: &'a [Mutex<UnitScratch>],
}

/// One layer of a step.
#[derive(Clone, Copy)]
pub struct LayerAttention<'a> {
    /// The index of its shape.
    pub shape: usize,
    /// Its keys and values.
    pub cache: KvView<'a>,
    /// Whether they are in the blocks of layers with a sliding window.
    pub windowed: bool,
    /// The factor of the products of queries and keys.
    pub scale: f32,
    /// If set, a score is this times the tanh of the scaled product divided by it.
    pub softcap: Option<f32>,
    /// One more score for each query head, whose value is zero (gpt-oss).
    pub sinks: Option<&'a [f32]>,
    /// Values that are added to scores by the distance between query and key.
    pub distances: Option<&'a Distances>,
    /// Rows of `stride`, each beginning with `heads * head_dim` queries.
    pub queries: SharedSlice<'a, f32>,
    /// Distance between two rows of queries, in elements.
    pub stride: usize,
}

impl AttentionStep<'_> {
    /// Computes `out` `[tokens, heads * head_dim]` of a layer's queries, after the step's keys and values are written.
    ///
    /// Every thread of the team calls it with the same arguments; it ends with a barrier.
    ///
    /// # Safety
    /// Until it returns on all threads, nobody may write the queries or the cache, and nobody else touch `out`.
    ///
    /// # Panics
    /// If a span does not lie within the cache or the arrays.
    pub unsafe fn attend(&self, team: &Team, given: LayerAttention, out: SharedSlice<f32>) {
        let (shape, plan) = (self.shapes[given.shape], &self.plans[given.shape]);
        let layer = Layer {
            cache: given.cache,
            group: shape.group(),
            parts: shape.parts,
            scale: given.scale,
            softcap: given.softcap,
            window: shape.window,
            causal: shape.causal,
            sinks: given.sinks,
            distances: given.distances,
            queries: given.queries,
            stride: given.stride,
            out,
            partials: self.partials,
        };
        let units = &plan.units;
        team.for_chunks(units.len(), plan.chunk, |range| {
            let mut scratch = self.scratch[team.index()]
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            for at in range.clone() {
                // Threads take turns.
                let next = if at + 1 < range.end {
                    at + 1
                } else {
                    range.end + plan.chunk * (team.size() - 1)
                };
                let with_sequence = |unit: &Unit| {
                    let span = &self.spans[unit.sequence];
                    (
                        *unit,
                        if given.windowed {
                            span.window
                        } else {
                            span.sequence
                        },
                    )
                };
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
        if !plan.merges.is_empty() {
            team.for_chunks(plan.merges.len(), 1, |range| {
                plan.merges[range]
                    .iter()
                    .for_each(|unit| merge_splits(&layer, unit));
            });
        }
    }
}

fn plan(spans: &[SeqSpan], shape: AttentionShape, threads: usize) -> Plan {
    let (kv, group) = (shape.kv, shape.group());
    let mut plan = Plan {
        chunk: 1,
        ..Plan::default()
    };
    // The start of the tile with the first key that the token at `position` sees.
    let first_key = |position: usize| {
        let seen = shape
            .window
            .map_or(0, |window| (position + 1).saturating_sub(window));
        seen / TILE * TILE
    };
    let mut short = Vec::new();
    for (sequence, span) in spans.iter().enumerate() {
        let rows = span.tokens * group;
        let start = span.context - span.tokens;
        // The tokens `first..first + tokens` of the span.
        let unit = |part, first: usize, tokens: usize| {
            let position = start + first;
            let first_split = first_key(position) / SPLIT;
            // The last token sees itself and, unless attention is causal, the rest of its window.
            let further = match (shape.causal, shape.window) {
                (true, _) => 0,
                (false, window) => window.map_or(span.context, |window| window - 1),
            };
            let context = span.context.min(position + tokens + further);
            Unit {
                sequence,
                part,
                first_token: span.first_token + first,
                first_position: position,
                tokens,
                context,
                first_key: first_key(position),
                first_split,
                splits: context.div_ceil(SPLIT) - first_split,
                partial: None,
            }
        };
        if rows <= NARROW_ROWS {
            for part in 0..shape.all_parts() {
                let whole = unit(part, 0, span.tokens);
                if whole.splits == 1 {
                    short.push(whole);
                    continue;
                }
                plan.merges.push(Unit {
                    partial: Some(plan.partial_len),
                    ..whole
                });
                for split in whole.first_split..whole.first_split + whole.splits {
                    short.push(Unit {
                        first_split: split,
                        splits: 1,
                        partial: Some(plan.partial_len),
                        ..whole
                    });
                    plan.partial_len += rows * (kv.width() + 2);
                }
            }
            continue;
        }
        // As many tokens as fill a unit's rows, unless threads would then have no work.
        let most = (WIDE_ROWS / group).max(1);
        let share = (span.tokens * shape.all_parts()).div_ceil(4 * threads);
        let tokens = share.clamp(most.min(1 + most / 4), most);
        // The last tokens see the most keys, so they come first.
        for first in (0..span.tokens).step_by(tokens).rev() {
            let count = tokens.min(span.tokens - first);
            let units = (0..shape.all_parts()).map(|part| unit(part, first, count));
            plan.units.extend(units);
        }
    }
    if plan.units.is_empty() {
        plan.chunk = (short.len() / (16 * threads)).max(1);
    }
    plan.units.extend(short);
    plan
}

/// Merges the splits of `first`, whose units have left partial results.
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
        layer.finish(first, row, &sums[at], softmax);
    }
}

impl Softmax {
    /// Reads the partial result that a unit has left.
    fn of(state: &[f32]) -> Self {
        Self {
            base: state[0],
            sum: state[1],
        }
    }
}

#[cfg(test)]
mod tests;
