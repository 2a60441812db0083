//! The context of a running step. Every thread of the pool executes the same operations.

use super::architecture::Architecture;
use super::attention::{AttentionStep, CacheView, Distances, KvView, LayerAttention};
use super::elementwise::Norm;
use super::experts::{ExpertScratch, ExpertsWeight, RouterWeight};
use super::heads::{HeadsScratch, HeadsWeight};
use super::isa::Isa;
use super::latent::LatentCache;
use super::linear::{Linear, QuantizedRows};
use super::low_rank::LowRankStep;
use super::memory::SharedSlice;
use super::model::Weight;
use super::op::{Op, Rows, Value};
use super::pool::Team;
use super::recurrent::StateStep;
use super::row_ops::{self, Columns};
use super::scratch::Scratch;
use super::step::StepInput;

/// A running step, as all threads see it.
pub(super) struct StepContext<'a> {
    pub(super) isa: Isa,
    architecture: &'a Architecture,
    pub(super) weights: &'a [Weight],
    step: &'a StepInput<'a>,
    cache: CacheView<'a>,
    pub(super) states: StateStep<'a>,
    attention: &'a AttentionStep<'a>,
    buffers: Vec<SharedSlice<'a, f32>>,
    quantized: SharedSlice<'a, u8>,
    part: SharedSlice<'a, f32>,
    experts: ExpertScratch<'a>,
    heads: HeadsScratch<'a>,
    pub(super) logits: SharedSlice<'a, f32>,
    pub(super) draft_logits: SharedSlice<'a, f32>,
    next_ids: SharedSlice<'a, i32>,
    /// Set if a sequence of the step has an adapter.
    pub(super) low_rank: Option<LowRankStep<'a>>,
}

impl<'a> StepContext<'a> {
    pub(super) fn new(
        isa: Isa,
        architecture: &'a Architecture,
        weights: &'a [Weight],
        step: &'a StepInput<'a>,
        (cache, states): (CacheView<'a>, StateStep<'a>),
        attention: &'a AttentionStep<'a>,
        scratch: &'a mut Scratch,
    ) -> Self {
        Self {
            isa,
            architecture,
            weights,
            step,
            cache,
            states,
            attention,
            buffers: scratch
                .buffers
                .iter_mut()
                .map(|buffer| SharedSlice::new(buffer))
                .collect(),
            quantized: SharedSlice::new(&mut scratch.quantized),
            part: SharedSlice::new(&mut scratch.part),
            experts: scratch.experts.share(),
            heads: scratch.heads.share(),
            logits: SharedSlice::new(&mut scratch.logits),
            draft_logits: SharedSlice::new(&mut scratch.draft_logits),
            next_ids: SharedSlice::new(&mut scratch.next_ids),
            low_rank: None,
        }
    }

    pub(super) fn ops(&self, team: &Team, ops: &[Op]) {
        for op in ops {
            self.op(team, op);
        }
    }

    /// Stores the sampled tokens as the next tokens of the sampled rows. Ends with a barrier.
    ///
    /// # Safety
    /// The tokens are sampled, and until it returns on all threads nobody else touches them.
    pub(super) unsafe fn note_sampled(&self, team: &Team, sampled: SharedSlice<i32>) {
        let rows = self.step.sample_rows;
        team.for_chunks(1, 1, |_| {
            // SAFETY: this is done by one thread, and the others wait for it.
            let next = unsafe { self.next_ids.get_mut(0..self.step.token_ids.len()) };
            // SAFETY: the caller's promise.
            let sampled = unsafe { sampled.get(0..rows.len()) };
            for (&row, &token) in rows.iter().zip(sampled) {
                // A row whose logits are not finite ends its sequence.
                next[row as usize] = token.max(0);
            }
        });
    }

    pub(super) fn rows(&self, value: Value) -> usize {
        match value.rows {
            Rows::Tokens => self.step.token_ids.len(),
            Rows::Sampled => self.step.sample_rows.len(),
        }
    }

    fn norm(&self, weight: usize) -> Norm<'a> {
        self.norm_of_parts(weight).0
    }

    /// A norm, and the number of parts of a row for which it has weights.
    fn norm_of_parts(&self, weight: usize) -> (Norm<'a>, usize) {
        match &self.weights[weight] {
            Weight::Norm(weight) => (weight.view(), weight.parts),
            _ => unreachable!("the recorder has looked at the weight"),
        }
    }

    fn parts(&self, weight: usize) -> &'a [Linear] {
        match &self.weights[weight] {
            Weight::Linear(parts) => parts,
            _ => unreachable!("the recorder has looked at the weight"),
        }
    }

    fn sinks(&self, weight: usize) -> &'a [f32] {
        match &self.weights[weight] {
            Weight::Sinks(sinks) => sinks,
            _ => unreachable!("the recorder has looked at the weight"),
        }
    }

    fn distances(&self, weight: usize) -> &'a Distances {
        match &self.weights[weight] {
            Weight::Distances(distances) => distances,
            _ => unreachable!("the recorder has looked at the weight"),
        }
    }

    fn router(&self, weight: usize) -> &'a RouterWeight {
        match &self.weights[weight] {
            Weight::Router(router) => router,
            _ => unreachable!("the recorder has looked at the weight"),
        }
    }

    fn experts(&self, weight: usize) -> &'a ExpertsWeight {
        match &self.weights[weight] {
            Weight::Experts(experts) => experts,
            _ => unreachable!("the recorder has looked at the weight"),
        }
    }

    fn heads(&self, weight: usize) -> &'a HeadsWeight {
        match &self.weights[weight] {
            Weight::Heads(heads) => heads,
            _ => unreachable!("the recorder has looked at the weight"),
        }
    }

    /// Cos and sin of a layer's rotation.
    fn angles(&self, layer: usize) -> Option<(&'a [f32], &'a [f32])> {
        self.architecture.shape.layers[layer].rope.map(|rope| {
            let (cos, sin) = &self.architecture.tables.ropes[rope];
            (cos.as_slice(), sin.as_slice())
        })
    }

    /// The factors of a layer's queries.
    fn query_scales(&self, layer: usize) -> Option<&'a [f32]> {
        let scales = self.architecture.shape.layers[layer].query_scales;
        scales.map(|at| self.architecture.tables.query_scales[at].as_slice())
    }

    /// The keys and values that a layer reads.
    fn kv(&self, layer: usize) -> KvView<'a> {
        self.cache.layer(self.architecture.places[layer].0)
    }

    /// Whether they are in the blocks of layers with a sliding window.
    fn windowed(&self, layer: usize) -> bool {
        self.architecture.windowed[self.architecture.places[layer].0]
    }

    /// The slots of the step's tokens in a layer's cache.
    fn slots(&self, layer: usize) -> &'a [i32] {
        if self.windowed(layer) {
            self.step.window_slots
        } else {
            self.step.slots
        }
    }

    pub(super) fn buffer(&self, value: Value) -> SharedSlice<'a, f32> {
        self.buffers[value.buffer]
    }

    /// Where an operation stores the quantized rows of `out` for the linear layer that follows, if it does.
    fn quantized_rows(&self, out: Value, quantize: bool) -> Option<QuantizedRows<'a>> {
        quantize.then(|| QuantizedRows::new(self.quantized, self.rows(out), out.width))
    }

    #[allow(
        clippy::too_many_lines,
        reason = "one arm for each operation reads best in one place"
    )]
    fn op(&self, team: &Team, op: &Op) {
        let isa = self.isa;
        // SAFETY: the recorder gives an operation's results buffers of their own, whose values nobody needs any more, and every
        // operation ends with a barrier. Slots differ: each is one token's.
        unsafe {
            match *op {
                Op::Embed { weight, scale, out } => {
                    let (table, ids) = (&self.parts(weight)[0], self.step.token_ids);
                    row_ops::embed(team, table, ids, scale, self.buffer(out));
                }
                Op::EmbedPlaces { weight, out } => {
                    let (table, places) = (&self.parts(weight)[0], self.step.places);
                    row_ops::embed(team, table, places, 1.0, self.buffer(out));
                }
                Op::EmbedNext { weight, scale, out } => {
                    let table = &self.parts(weight)[0];
                    let ids = self.next_ids.get(0..self.rows(out));
                    row_ops::embed(team, table, ids, scale, self.buffer(out));
                }
                Op::Join { first, second, out } => {
                    let columns = |value: Value| (self.buffer(value), value.width);
                    let to = self.buffer(out);
                    row_ops::join(team, columns(first), columns(second), self.rows(out), to);
                }
                Op::Norm {
                    x,
                    groups,
                    weight,
                    out,
                    quantize,
                } => {
                    let (x, n, to) = (self.buffer(x), self.rows(out) * groups, self.buffer(out));
                    let quantized = self.quantized_rows(out, quantize);
                    let norm = self.norm_of_parts(weight);
                    row_ops::norm(team, isa, x, n, norm, to, quantized.as_ref());
                }
                Op::AddNorm {
                    x,
                    scale,
                    residual,
                    weight,
                    out,
                    quantize,
                } => {
                    let (x, residual) = ((self.buffer(x), scale), self.buffer(residual));
                    let (n, norm, to) = (self.rows(out), self.norm(weight), self.buffer(out));
                    let quantized = self.quantized_rows(out, quantize);
                    row_ops::add_norm(team, isa, x, residual, n, norm, to, quantized.as_ref());
                }
                Op::Add { x, scale, residual } => {
                    let (n, width) = (self.rows(x), x.width);
                    let (x, residual) = ((self.buffer(x), scale), self.buffer(residual));
                    row_ops::add(team, isa, x, residual, n, width);
                }
                Op::Scale { x, factor } => {
                    row_ops::scale(team, self.buffer(x), self.rows(x), x.width, factor);
                }
                Op::GateRows { x, gates } => {
                    let (rows, gates) = (self.rows(x), self.buffer(gates));
                    row_ops::gate_rows(team, self.buffer(x), gates, rows, x.width);
                }
                Op::Linear {
                    x,
                    weight,
                    out,
                    quantized,
                } => {
                    self.linear(team, x, weight, self.buffer(out), quantized);
                }
                Op::RopeAndCache { qkv, layer, norms } => {
                    let shape = &self.architecture.shape.layers[layer];
                    let [q_norm, k_norm, v_norm] =
                        norms.map(|norm| norm.map(|norm| self.norm(norm)));
                    let rotation = row_ops::RopeAndCache {
                        heads: shape.attention.heads,
                        angles: self.angles(layer),
                        query_scales: self.query_scales(layer),
                        q_norm,
                        k_norm,
                        v_norm,
                        cache: self.kv(layer),
                    };
                    let rows = (self.buffer(qkv), qkv.width);
                    rotation.run(team, isa, rows, self.step.positions, self.slots(layer));
                }
                Op::Attention {
                    queries,
                    layer,
                    sinks,
                    distances,
                    out,
                } => {
                    let shape = &self.architecture.shape.layers[layer];
                    let given = LayerAttention {
                        shape: self.architecture.places[layer].1,
                        cache: self.kv(layer),
                        windowed: self.windowed(layer),
                        scale: shape.scale,
                        softcap: shape.softcap,
                        sinks: sinks.map(|sinks| self.sinks(sinks)),
                        distances: distances.map(|distances| self.distances(distances)),
                        queries: self.buffer(queries),
                        stride: queries.stride,
                    };
                    self.attention.attend(team, given, self.buffer(out));
                }
                Op::Activate {
                    x,
                    factor,
                    activation,
                    out,
                    quantize,
                } => {
                    let columns = |value: Value, start| Columns {
                        buffer: self.buffer(value),
                        start,
                        stride: value.stride,
                    };
                    let factor = factor.map(|(value, start)| columns(value, start));
                    let size = (self.rows(out), out.width);
                    let quantized = self.quantized_rows(out, quantize);
                    row_ops::activate(
                        team,
                        isa,
                        activation,
                        columns(x, 0),
                        factor,
                        size,
                        self.buffer(out),
                        quantized.as_ref(),
                    );
                }
                Op::Conv {
                    x,
                    layer,
                    weight,
                    gate,
                    out,
                } => self.conv(team, (x, out), layer, weight, gate),
                Op::Scan {
                    x,
                    gates,
                    layer,
                    weight,
                    rule,
                    groups,
                    out,
                } => self.scan(team, (x, gates, out), layer, weight, (rule, groups)),
                Op::GatherRows { x, out } => {
                    row_ops::gather(
                        team,
                        self.buffer(x),
                        out.width,
                        self.step.sample_rows,
                        self.buffer(out),
                    );
                }
                Op::Heads {
                    x,
                    weight,
                    passed,
                    out,
                } => {
                    let heads = self.heads(weight);
                    let given = (self.buffer(x), self.rows(x), x.width / heads.count());
                    heads.forward(team, isa, given, passed, &self.heads, self.buffer(out));
                }
                Op::LatentCache { q, kv, layer, norm } => {
                    let latents = LatentCache {
                        rank: self.architecture.shape.layers[layer].rank.unwrap_or(0),
                        angles: self.angles(layer),
                        query_scales: self.query_scales(layer),
                        norm: self.norm(norm),
                        cache: self.kv(layer),
                    };
                    let (queries, latent) = ((self.buffer(q), q.width), self.buffer(kv));
                    let at = (self.step.positions, self.slots(layer));
                    latents.run(team, isa, queries, latent, at);
                }
                Op::Route {
                    x,
                    weight,
                    logits,
                    out,
                } => {
                    let (given, logits) = ((self.buffer(x), self.rows(x)), self.buffer(logits));
                    let (router, out) = (self.router(weight), self.buffer(out));
                    router.route(team, given, logits, out, self.quantized);
                }
                Op::Experts {
                    x,
                    routing,
                    weight,
                    out,
                } => {
                    let given = (self.buffer(x), self.rows(x));
                    let routing = (self.buffer(routing), routing.width / 2);
                    let (experts, out) = (self.experts(weight), self.buffer(out));
                    experts.forward(team, isa, given, routing, &self.experts, out);
                }
            }
        }
    }

    /// `y [rows, out]` = the linear layer of the rows of `x`, which are contiguous, with the updates of their adapters. Ends with a
    /// barrier.
    pub(super) fn linear(
        &self,
        team: &Team,
        x: Value,
        weight: usize,
        y: SharedSlice<'a, f32>,
        quantized: bool,
    ) {
        self.whole_linear(team, x, weight, y, quantized);
        if let Some(low_rank) = &self.low_rank {
            let outputs = self.parts(weight).iter().map(Linear::out_features).sum();
            let given = (self.buffer(x), x.width);
            // SAFETY: the rows and the outputs were written before the last barrier, and nobody else touches them.
            unsafe { low_rank.add(team, self.isa, weight, x.rows, given, (y, outputs)) };
        }
    }

    fn whole_linear(
        &self,
        team: &Team,
        x: Value,
        weight: usize,
        y: SharedSlice<'a, f32>,
        quantized: bool,
    ) {
        let (rows, parts) = (self.rows(x), self.parts(weight));
        let given = self.buffer(x);
        let integers = parts.iter().any(Linear::is_quantized);
        let quantized_rows = QuantizedRows::new(self.quantized, rows, x.width);
        if integers && !quantized {
            // SAFETY: the rows were written before the last barrier.
            unsafe { quantized_rows.quantize(self.isa, team, given) };
        }
        let apply = |part: &Linear, to: SharedSlice<f32>| {
            // SAFETY: as above, and nobody else touches the outputs.
            unsafe {
                if part.is_quantized() {
                    part.forward_quantized(team, &quantized_rows, to);
                } else {
                    part.forward(team, given, rows, to, self.quantized);
                }
            }
        };
        if let [whole] = parts {
            apply(whole, y);
            return;
        }
        let stride: usize = parts.iter().map(Linear::out_features).sum();
        let mut first = 0;
        for part in parts {
            apply(part, self.part);
            let width = part.out_features();
            team.for_chunks(rows, rows.div_ceil(4 * team.size()), |range| {
                for row in range {
                    let to = row * stride + first;
                    // SAFETY: the part is written, and each row's place is one thread's.
                    unsafe {
                        let from = self.part.get(row * width..(row + 1) * width);
                        y.get_mut(to..to + width).copy_from_slice(from);
                    }
                }
            });
            first += width;
        }
    }
}
