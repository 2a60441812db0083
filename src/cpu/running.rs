//! A step while it runs: every thread of the pool goes through the same operations.

use super::attention::{AttentionStep, KvCache, KvView};
use super::isa::Isa;
use super::linear::{Linear, QuantizedRows};
use super::memory::Shared;
use super::model::{ModelShape, Weight};
use super::pool::Team;
use super::program::{Op, Program, Rows, Value};
use super::rows;
use super::run::Memory;
use super::step::StepInput;

/// A step while it runs, as all threads see it.
pub(super) struct Running<'a> {
    isa: Isa,
    shape: &'a ModelShape,
    weights: &'a [Weight],
    cos: &'a [f32],
    sin: &'a [f32],
    step: &'a StepInput<'a>,
    cache: KvView<'a>,
    attention: &'a AttentionStep<'a>,
    buffers: Vec<Shared<'a, f32>>,
    quantized: Shared<'a, u8>,
    part: Shared<'a, f32>,
    pub(super) logits: Shared<'a, f32>,
}

impl<'a> Running<'a> {
    #[allow(
        clippy::too_many_arguments,
        reason = "the fields of one model, borrowed one by one"
    )]
    pub(super) fn new(
        isa: Isa,
        shape: &'a ModelShape,
        weights: &'a [Weight],
        (cos, sin): (&'a [f32], &'a [f32]),
        step: &'a StepInput<'a>,
        cache: &'a mut KvCache,
        attention: &'a AttentionStep<'a>,
        memory: &'a mut Memory,
    ) -> Self {
        Self {
            isa,
            shape,
            weights,
            cos,
            sin,
            step,
            cache: cache.view(),
            attention,
            buffers: memory
                .buffers
                .iter_mut()
                .map(|buffer| Shared::new(buffer))
                .collect(),
            quantized: Shared::new(&mut memory.quantized),
            part: Shared::new(&mut memory.part),
            logits: Shared::new(&mut memory.logits),
        }
    }

    pub(super) fn program(&self, team: &Team, program: &Program) {
        for op in &program.ops {
            self.op(team, op);
        }
    }

    fn rows(&self, value: Value) -> usize {
        match value.rows {
            Rows::Tokens => self.step.token_ids.len(),
            Rows::Sampled => self.step.sample_rows.len(),
        }
    }

    fn norm(&self, weight: usize) -> &'a [f32] {
        match &self.weights[weight] {
            Weight::Norm(weight) => weight,
            Weight::Linear(_) => unreachable!("the recorder has looked at the weight"),
        }
    }

    fn parts(&self, weight: usize) -> &'a [Linear] {
        match &self.weights[weight] {
            Weight::Linear(parts) => parts,
            Weight::Norm(_) => unreachable!("the recorder has looked at the weight"),
        }
    }

    fn buffer(&self, value: Value) -> Shared<'a, f32> {
        self.buffers[value.buffer]
    }

    /// Where an operation leaves the rows of `out` for the linear layer that follows, if it does.
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
                Op::Embed { weight, out } => {
                    rows::embed(
                        team,
                        &self.parts(weight)[0],
                        self.step.token_ids,
                        self.buffer(out),
                    );
                }
                Op::RmsNorm {
                    x,
                    weight,
                    eps,
                    out,
                    quantize,
                } => {
                    let (x, n, to) = (self.buffer(x), self.rows(out), self.buffer(out));
                    let quantized = self.quantized_rows(out, quantize);
                    rows::rms_norm(
                        team,
                        isa,
                        x,
                        n,
                        self.norm(weight),
                        eps,
                        to,
                        quantized.as_ref(),
                    );
                }
                Op::AddRmsNorm {
                    x,
                    residual,
                    weight,
                    eps,
                    out,
                    quantize,
                } => {
                    let (x, residual) = (self.buffer(x), self.buffer(residual));
                    let (n, to) = (self.rows(out), self.buffer(out));
                    let quantized = self.quantized_rows(out, quantize);
                    rows::add_rms_norm(
                        team,
                        isa,
                        x,
                        residual,
                        n,
                        self.norm(weight),
                        eps,
                        to,
                        quantized.as_ref(),
                    );
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
                    let rotation = rows::RopeAndCache {
                        heads: self.shape.heads,
                        cos: self.cos,
                        sin: self.sin,
                        q_norm: norms.map(|(q, _)| self.norm(q)),
                        k_norm: norms.map(|(_, k)| self.norm(k)),
                        eps: self.shape.rms_norm_eps,
                        cache: self.cache,
                        layer,
                    };
                    rotation.run(
                        team,
                        isa,
                        self.buffer(qkv),
                        self.step.positions,
                        self.step.slots,
                    );
                }
                Op::Attention {
                    queries,
                    layer,
                    out,
                } => {
                    let from = self.buffer(queries);
                    self.attention.attend(
                        team,
                        layer,
                        self.cache,
                        from,
                        queries.stride,
                        self.buffer(out),
                    );
                }
                Op::SiluMul { x, out, quantize } => {
                    let (n, to) = (self.rows(out), self.buffer(out));
                    let quantized = self.quantized_rows(out, quantize);
                    rows::silu_mul(
                        team,
                        isa,
                        self.buffer(x),
                        n,
                        out.width,
                        to,
                        quantized.as_ref(),
                    );
                }
                Op::GatherRows { x, out } => {
                    rows::gather(
                        team,
                        self.buffer(x),
                        out.width,
                        self.step.sample_rows,
                        self.buffer(out),
                    );
                }
            }
        }
    }

    /// `y [rows, out]` of the rows of `x`, which lie side by side. Ends with a barrier.
    pub(super) fn linear(
        &self,
        team: &Team,
        x: Value,
        weight: usize,
        y: Shared<'a, f32>,
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
        let apply = |part: &Linear, to: Shared<f32>| {
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
