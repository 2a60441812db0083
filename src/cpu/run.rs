//! The run of a recorded program over one step: every thread of the pool goes through the same operations.

use super::attention::{AttentionStep, KvCache, KvView, PAGE, Run, Sequence};
use super::isa::Isa;
use super::linear::{Linear, QuantizedRows};
use super::memory::{Aligned, Shared};
use super::model::{Model, ModelShape, Weight};
use super::pool::Team;
use super::program::{Op, Program, Rows, Value};
use super::rows;
use super::sample::{SampleExtras, SampleRows, Sampled, Sampling, TokenMasks};
use crate::error::{Error, Result};

/// The input of a step: T tokens of S sequences, and R rows to sample; see `StepBuffers` of `lmserve/model/interface.py`.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct StepInput<'a> {
    pub token_ids: &'a [i32],
    pub positions: &'a [i32],
    pub slots: &'a [i32],
    pub query_start: &'a [i32],
    pub context_lens: &'a [i32],
    /// `stride` block ids for each sequence.
    pub block_tables: &'a [i32],
    pub stride: usize,
    pub sample_rows: &'a [i32],
}

/// How a step's rows are sampled, and where the outcome goes.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct StepSampling<'a> {
    pub rows: SampleRows<'a>,
    pub extras: Option<&'a SampleExtras>,
    pub masks: Option<&'a dyn TokenMasks>,
    pub out: Sampled<'a>,
}

/// What programs write, kept from step to step.
#[derive(Default)]
pub(super) struct Memory {
    buffers: Vec<Aligned<f32>>,
    quantized: Aligned<u8>,
    /// One part of a linear layer whose parts differ.
    part: Aligned<f32>,
    pub(super) logits: Aligned<f32>,
}

impl Model {
    /// Runs a step of `program`, which leaves the states of the sampled rows, samples from the logits that `head` makes of them,
    /// and leaves these in [`Model::logits`].
    ///
    /// # Errors
    /// `internal_error` for a step that does not fit the model; it has done nothing then.
    ///
    /// # Panics
    /// As [`Sampling::sample`].
    pub fn run(
        &mut self,
        program: &Program,
        head: usize,
        step: &StepInput,
        sampling: &StepSampling,
    ) -> Result<()> {
        let vocab = self.linear_shape(head)?.out;
        let pages = self.cache.pages();
        let runs = step.runs(&self.shape, self.cos.len(), pages)?;
        let rows = (step.token_ids.len(), step.sample_rows.len());
        self.reserve(program, rows, Some(head))?;
        let Self {
            isa,
            pool,
            shape,
            weights,
            cos,
            sin,
            cache,
            attention,
            memory,
        } = self;
        let attention = attention.begin(&runs);
        let run = Running::new(
            *isa,
            shape,
            weights,
            (cos, sin),
            step,
            cache,
            &attention,
            memory,
        );
        let sampler = Sampling {
            isa: *isa,
            vocab,
            rows: sampling.rows,
            extras: sampling.extras,
            masks: sampling.masks,
            out: sampling.out,
        };
        pool.run(&|team| {
            run.program(team, program);
            if let Some(states) = program.result.filter(|_| rows.1 > 0) {
                run.linear(team, states, head, run.logits, false);
                // SAFETY: the logits are written, and nobody else touches them or the outputs.
                unsafe { sampler.sample(team, run.logits) };
            }
        });
        Ok(())
    }

    /// Runs `program` over a step in another cache, and gives its result's rows.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub(super) fn run_states(
        &mut self,
        program: &Program,
        step: &StepInput,
        cache: &mut KvCache,
    ) -> Result<(Value, &[f32])> {
        let result = program
            .result
            .ok_or_else(|| Error::internal("the program has no result"))?;
        let runs = step.runs(&self.shape, self.cos.len(), cache.pages())?;
        self.reserve(program, (step.token_ids.len(), 0), None)?;
        let Self {
            isa,
            pool,
            shape,
            weights,
            cos,
            sin,
            attention,
            memory,
            ..
        } = self;
        let attention = attention.begin(&runs);
        let run = Running::new(
            *isa,
            shape,
            weights,
            (cos, sin),
            step,
            cache,
            &attention,
            memory,
        );
        pool.run(&|team| run.program(team, program));
        Ok((result, &self.memory.buffers[result.buffer]))
    }

    /// The logits `[rows, vocab]` of the last step, changed where a row had a temperature, a bias, a penalty or a mask.
    pub fn logits(&self) -> &[f32] {
        &self.memory.logits
    }

    /// Makes room for a step.
    fn reserve(
        &mut self,
        program: &Program,
        (tokens, sampled): (usize, usize),
        head: Option<usize>,
    ) -> Result<()> {
        let rows_of = |rows| {
            if rows == Rows::Tokens {
                tokens
            } else {
                sampled
            }
        };
        let memory = &mut self.memory;
        memory.buffers.resize_with(
            memory.buffers.len().max(program.buffers.len()),
            Aligned::default,
        );
        // A buffer may be used for both kinds of rows; there are never more sampled ones than tokens.
        for (buffer, width) in memory.buffers.iter_mut().zip(&program.buffers) {
            grow(buffer, width * tokens.max(sampled));
        }
        let linears = program.ops.iter().filter_map(|op| match op {
            Op::Linear { x, weight, .. } => Some((rows_of(x.rows), *weight)),
            _ => None,
        });
        let (mut quantized, mut part) = (0, 0);
        for (rows, weight) in linears.chain(head.map(|head| (sampled, head))) {
            if let Weight::Linear(parts) = &self.weights[weight] {
                quantized =
                    quantized.max(QuantizedRows::bytes(rows.max(1), parts[0].in_features()));
                if parts.len() > 1 {
                    part =
                        part.max(rows * parts.iter().map(Linear::out_features).max().unwrap_or(0));
                }
            }
        }
        grow(&mut memory.quantized, quantized);
        grow(&mut memory.part, part);
        if let Some(head) = head {
            let vocab = self.linear_shape(head)?.out;
            grow(&mut self.memory.logits, sampled * vocab);
        }
        Ok(())
    }
}

fn grow<T: super::memory::Plain>(buffer: &mut Aligned<T>, len: usize) {
    if buffer.len() < len {
        *buffer = Aligned::zeroed(len);
    }
}

impl StepInput<'_> {
    /// The step's sequences, once everything is known to lie within the model.
    fn runs(&self, shape: &ModelShape, table_len: usize, pages: usize) -> Result<Vec<Run<'_>>> {
        let sequences = self.context_lens.len();
        let positions = table_len / (shape.kv.head_dim / 2).max(1);
        let tokens = self.token_ids.len();
        let within =
            |values: &[i32], limit: usize| values.iter().all(|&v| v >= 0 && (v as usize) < limit);
        check(
            within(self.token_ids, shape.vocab_size),
            "a token id",
            shape.vocab_size,
        )?;
        check(within(self.positions, positions), "a position", positions)?;
        check(within(self.slots, pages * PAGE), "a slot", pages * PAGE)?;
        check(within(self.sample_rows, tokens), "a sampled row", tokens)?;
        let mut runs = Vec::with_capacity(sequences);
        for s in 0..sequences {
            let (first, last) = (
                self.query_start[s] as usize,
                self.query_start[s + 1] as usize,
            );
            let context = self.context_lens[s] as usize;
            let blocks = context.div_ceil(shape.block_size);
            check(
                first < last && last <= tokens && last - first <= context,
                "a sequence's end",
                tokens,
            )?;
            check(
                blocks <= self.stride && context <= positions,
                "a context",
                positions,
            )?;
            let table = &self.block_tables[s * self.stride..s * self.stride + blocks];
            let num_blocks = pages * PAGE / shape.block_size;
            check(within(table, num_blocks), "a block id", num_blocks)?;
            runs.push(Run {
                sequence: Sequence {
                    table,
                    block_size: shape.block_size,
                },
                first_token: first,
                tokens: last - first,
                context,
            });
        }
        Ok(runs)
    }
}

fn check(holds: bool, what: &str, limit: usize) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::internal(format!(
        "{what} of the step lies outside of the {limit} there are"
    )))
}

/// A step while it runs, as all threads see it.
struct Running<'a> {
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
    logits: Shared<'a, f32>,
}

impl<'a> Running<'a> {
    #[allow(
        clippy::too_many_arguments,
        reason = "the fields of one model, borrowed one by one"
    )]
    fn new(
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

    fn program(&self, team: &Team, program: &Program) {
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
    fn linear(&self, team: &Team, x: Value, weight: usize, y: Shared<'a, f32>, quantized: bool) {
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
