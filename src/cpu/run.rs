//! Runs a recorded program over one step.

use super::attention::KvCache;
use super::isa::Isa;
use super::linear::{Linear, QuantizedRows};
use super::memory::{Aligned, SharedSlice};
use super::model::{Model, Weight};
use super::op::{Op, Rows, Value};
use super::pool::Team;
use super::program::Program;
use super::recurrent::{StateCache, StateStep};
use super::row_ops;
use super::sample::{Sampling, argmax};
use super::step::{StepInput, StepSampling};
use super::step_context::StepContext;
use crate::error::{Error, Result};

impl Model {
    /// Runs a step of `program`, which computes the states of the sampled rows. Samples from the logits that `head` computes from
    /// them, and keeps these in [`Model::logits`].
    ///
    /// # Errors
    /// `internal_error` for a step that does not fit the model. Nothing is computed then.
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
        let sampler = Sampling {
            isa: self.isa,
            vocab: self.linear_shape(head)?.out,
            rows: sampling.rows,
            edits: sampling.edits,
            masks: sampling.masks,
            out: sampling.out,
        };
        let sampled = |_: &Value| !step.sample_rows.is_empty();
        let states = program.result.filter(sampled);
        let drafted = program.draft.filter(|draft| sampled(&draft.states));
        let draft_vocab = program.draft.map(|draft| self.linear_shape(draft.head));
        let draft_vocab = draft_vocab.transpose()?.map_or(0, |shape| shape.out);
        let (isa, shape) = (self.isa, &self.architecture.shape);
        let (scale, softcap) = (shape.logits_scale, shape.logits_softcap);
        let capped = softcap.is_some() || scale.is_some();
        self.go_through(program, Some(head), step, None, &|run, team| {
            if let Some(states) = states {
                run.linear(team, states, head, run.logits, false);
                if capped {
                    let len = run.rows(states) * sampler.vocab;
                    // SAFETY: the logits are written, and nobody else touches them.
                    unsafe { row_ops::cap(team, isa, run.logits, len, scale, softcap) };
                }
                // SAFETY: the logits are written, and nobody else touches them or the outputs.
                unsafe { sampler.sample(team, run.logits) };
            }
            let Some(draft) = program.draft else { return };
            // SAFETY: the rows are sampled, and nobody else touches the tokens that come next.
            unsafe { run.note_sampled(team, sampling.out.tokens) };
            run.ops(team, &program.ops[draft.first..]);
            if let Some(draft) = drafted {
                run.linear(team, draft.states, draft.head, run.draft_logits, false);
                // SAFETY: the logits are written, and nobody else touches them or the outputs.
                unsafe {
                    let shape = (run.rows(draft.states), draft_vocab);
                    guess(team, isa, run.draft_logits, shape, sampling.drafts);
                }
            }
        })
    }

    /// Runs `program` over a step in another cache and with other states. Returns the rows of its result.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub(super) fn run_states(
        &mut self,
        program: &Program,
        step: &StepInput,
        other: (&mut KvCache, &mut StateCache),
    ) -> Result<(Value, &[f32])> {
        let result = program
            .result
            .ok_or_else(|| Error::internal("the program has no result"))?;
        self.go_through(program, None, step, Some(other), &|_, _| ())?;
        Ok((result, &self.scratch.buffers[result.buffer]))
    }

    /// Runs `program` and then `then` on all threads, in the model's cache and states or in others.
    fn go_through(
        &mut self,
        program: &Program,
        head: Option<usize>,
        step: &StepInput,
        other: Option<(&mut KvCache, &mut StateCache)>,
        then: &(dyn Fn(&StepContext, &Team) + Sync),
    ) -> Result<()> {
        let sizes = |cache: &KvCache, states: &StateCache| {
            let pages = (cache.pages(), cache.window_pages());
            (pages, states.slots())
        };
        let (pages, slots) = match &other {
            Some((cache, states)) => sizes(cache, states),
            None => sizes(&self.cache, &self.states),
        };
        let spans = step.spans(&self.architecture.shape, pages)?;
        let state_spans = step.state_spans(&self.architecture.shape, slots)?;
        let copies = step.copied_pages(&self.architecture.shape, pages.0)?;
        self.reserve(
            program,
            (step.token_ids.len(), step.sample_rows.len()),
            head,
        )?;
        if program.draft.is_some() {
            step.write_next(&self.architecture.shape, &mut self.scratch.next_ids)?;
        }
        let Self {
            isa,
            pool,
            architecture,
            weights,
            cache,
            states,
            attention,
            scratch,
            packed: _,
            adapters,
        } = self;
        let low_rank = adapters.begin(step)?;
        let attention = attention.begin(&spans);
        let (cache, states) = other.unwrap_or((cache, states));
        for (from, to, count) in copies {
            cache.copy_pages(from, to, count);
        }
        let states = StateStep {
            view: states.view(),
            spans: &state_spans,
        };
        let kept = (cache.view(), states);
        let mut run =
            StepContext::new(*isa, architecture, weights, step, kept, &attention, scratch);
        run.low_rank = low_rank;
        pool.run(&|team| {
            let first = program.draft.map_or(program.ops.len(), |draft| draft.first);
            run.ops(team, &program.ops[..first]);
            then(&run, team);
        });
        Ok(())
    }

    /// The logits `[rows, vocab]` of the last step. They are changed in rows with a temperature, a bias, a penalty or a mask.
    pub fn logits(&self) -> &[f32] {
        &self.scratch.logits
    }

    /// The logits `[rows, vocab]` from which the last step's next tokens were predicted.
    pub fn draft_logits(&self) -> &[f32] {
        &self.scratch.draft_logits
    }

    /// Grows the buffers for a step.
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
        let scratch = &mut self.scratch;
        scratch.buffers.resize_with(
            scratch.buffers.len().max(program.buffers.len()),
            Aligned::default,
        );
        // A buffer may hold rows of both kinds. There are never more sampled rows than tokens.
        for (buffer, width) in scratch.buffers.iter_mut().zip(&program.buffers) {
            buffer.grow(width * tokens.max(sampled));
        }
        let linears = program.ops.iter().filter_map(|op| match op {
            Op::Linear { x, weight, .. } => Some((rows_of(x.rows), *weight)),
            _ => None,
        });
        let (mut quantized, mut part) = (0, 0);
        let heads = head
            .into_iter()
            .chain(program.draft.map(|draft| draft.head));
        for (rows, weight) in linears.chain(heads.map(|head| (sampled, head))) {
            if let Weight::Linear(parts) = &self.weights[weight] {
                quantized =
                    quantized.max(QuantizedRows::bytes(rows.max(1), parts[0].in_features()));
                if parts.len() > 1 {
                    part =
                        part.max(rows * parts.iter().map(Linear::out_features).max().unwrap_or(0));
                }
            }
        }
        let threads = self.pool.size();
        for op in &program.ops {
            if let Op::Experts {
                x, routing, weight, ..
            } = op
                && let Weight::Experts(experts) = &self.weights[*weight]
            {
                let (rows, top_k) = (rows_of(x.rows), routing.width / 2);
                scratch.experts.reserve(experts, rows, top_k, threads);
            }
            if let Op::Heads { x, weight, .. } = op
                && let Weight::Heads(heads) = &self.weights[*weight]
            {
                scratch.heads.reserve(heads, rows_of(x.rows));
            }
        }
        scratch.quantized.grow(quantized);
        scratch.part.grow(part);
        if let Some(head) = head {
            let vocab = self.linear_shape(head)?.out;
            self.scratch.logits.grow(sampled * vocab);
        }
        if let Some(draft) = program.draft {
            let vocab = self.linear_shape(draft.head)?.out;
            self.scratch.draft_logits.grow(sampled * vocab);
            self.scratch.next_ids.grow(tokens);
        }
        Ok(())
    }
}

/// The most likely token of each row of `logits [rows, vocab]`.
///
/// # Safety
/// Until it returns on all threads, nobody may write `logits`, and nobody else touch `drafts`.
unsafe fn guess(
    team: &Team,
    isa: Isa,
    logits: SharedSlice<f32>,
    (rows, vocab): (usize, usize),
    drafts: SharedSlice<i32>,
) {
    team.for_chunks(rows, 1, |range| {
        for row in range {
            // SAFETY: each row is one thread's.
            unsafe {
                let token = argmax(isa, logits.get(row * vocab..(row + 1) * vocab));
                drafts.get_mut(row..row + 1)[0] = token as i32;
            }
        }
    });
}
