//! The engine without its thread: whoever embeds it runs the model between `plan` and `commit`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyDict};

use super::event::{Collector, Event};
use super::masks::StepMasks;
use super::step_buffers::bytes_of;
use super::text::{ChatTemplate, Tokenizer};
use crate::engine::{Abort, Core, Grammars, Limits, StepOutput, TurnGuard, prepare, request_of};
use crate::error::{Error, Result};
use crate::kv::BlockPool;
use crate::request::{SessionId, Submission};
use crate::sched::{SchedulerConfig, Step};
use crate::session::{SessionKey, SessionStore, StoreLimits, TurnHistory};
use crate::text;

struct State {
    core: Core,
    output: StepOutput,
    next_request: u64,
}

/// Scheduler, KV books, sessions and text of one model, without a thread, a clock or a model.
#[pyclass(frozen, module = "lmserve._core")]
pub struct Scheduler {
    state: Mutex<State>,
    sessions: Arc<Mutex<SessionStore>>,
    tokenizer: Option<Arc<text::Tokenizer>>,
    template: Option<Arc<text::ChatTemplate>>,
    limits: Limits,
    grammars: Grammars,
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// A number that no request has.
    fn next_request(&mut self) -> u64 {
        self.next_request += 1;
        self.next_request - 1
    }

    /// Books one token for each sampled row of the planned step.
    fn commit(&mut self, tokens: &[i64], vocab_size: usize, now_ms: u64) -> Result<Vec<Event>> {
        let State { core, output, .. } = self;
        let rows: Vec<u64> = core
            .scheduler()
            .step()
            .scheduled
            .iter()
            .filter(|s| s.samples)
            .map(|s| s.id)
            .collect();
        if tokens.len() != rows.len() {
            let message = format!(
                "the step has {} sampled rows, but {} tokens were given",
                rows.len(),
                tokens.len()
            );
            return Err(Error::invalid("tokens", message));
        }
        output.tokens.clear();
        for &token in tokens {
            if !(0..vocab_size as i64).contains(&token) {
                let message =
                    format!("token ids must lie in [0, {vocab_size}), but {token} was given");
                return Err(Error::invalid("tokens", message));
            }
            output.tokens.push(token as u32);
        }
        let mut collector = Collector::new(now_ms);
        for (&id, &token) in rows.iter().zip(&output.tokens) {
            if let Some(sampled) = core.tokens_of(id) {
                let (request, choice) = request_of(id);
                let event = collector.of(request, choice);
                event.token = Some(token);
                event.tokens = sampled + 1;
            }
        }
        core.commit(output, &mut collector)?;
        Ok(collector.events)
    }
}

/// The step's arrays by name, in native byte order.
fn arrays(step: &Step) -> Vec<(&'static str, Vec<u8>)> {
    let width = step.block_tables.iter().map(|table| table.len()).max();
    let width = width.unwrap_or(0);
    let mut tables = Vec::with_capacity(width * step.num_sequences());
    for table in &step.block_tables {
        tables.extend(table.iter().map(|&block| block as i32));
        tables.resize(tables.len().next_multiple_of(width.max(1)), 0);
    }
    let integers = [
        ("token_ids", &step.token_ids),
        ("positions", &step.positions),
        ("slots", &step.slots),
        ("query_start", &step.query_start),
        ("context_lens", &step.context_lens),
        ("block_tables", &tables),
        ("sample_rows", &step.sample_rows),
        ("top_k", &step.top_k),
        ("bias_start", &step.bias_start),
        ("bias_token", &step.bias_token),
        ("seen_start", &step.seen_start),
        ("seen_token", &step.seen_token),
        ("seen_count", &step.seen_count),
    ];
    let floats = [
        ("temperature", &step.temperature),
        ("top_p", &step.top_p),
        ("min_p", &step.min_p),
        ("repetition_penalty", &step.repetition_penalty),
        ("presence_penalty", &step.presence_penalty),
        ("frequency_penalty", &step.frequency_penalty),
        ("uniform", &step.uniform),
        ("bias_value", &step.bias_value),
    ];
    let integers = integers.map(|(name, values)| (name, bytes_of(values, i32::to_ne_bytes)));
    let floats = floats.map(|(name, values)| (name, bytes_of(values, f32::to_ne_bytes)));
    integers.into_iter().chain(floats).collect()
}

impl Scheduler {
    /// Calls `change` with the state, without the GIL: whoever waits for the lock must not keep its holder from the GIL, and so
    /// nothing of Python happens while the lock is held.
    fn with_state<T: Send>(
        &self,
        py: Python<'_>,
        change: impl FnOnce(&mut State) -> T + Send,
    ) -> T {
        py.detach(|| change(&mut guard(&self.state)))
    }

    /// Renders, tokenizes and compiles with no lock held, then hands the request to the scheduler.
    fn admit(&self, submission: &Submission, random: u64, now_ms: u64) -> Result<u64> {
        let request = guard(&self.state).next_request();
        let (lease, base) = self.begin(submission, request, now_ms)?;
        let seed = submission.sampling.seed.or(base.seed).unwrap_or(random);
        let mut prepared = prepare(
            submission,
            base,
            self.tokenizer.as_deref(),
            self.template.as_deref(),
            self.limits,
            &|| Ok(()),
        )?;
        if let Some(grammar) = prepared.grammar.take() {
            prepared.matchers = self.grammars.matchers(&grammar, submission.n as usize)?;
        }
        let mut state = guard(&self.state);
        state.core.add(request, submission, prepared, lease, seed)?;
        Ok(request)
    }

    fn begin(
        &self,
        submission: &Submission,
        request: u64,
        now_ms: u64,
    ) -> Result<(Option<TurnGuard>, TurnHistory)> {
        let Some(session) = &submission.session else {
            return Ok((None, TurnHistory::empty()));
        };
        let key = SessionKey::new(submission.tenant, session.id.clone());
        let (lease, base) = TurnGuard::begin_turn(&self.sessions, key, session, request, now_ms)?;
        Ok((Some(lease), base))
    }
}

#[pymethods]
impl Scheduler {
    #[new]
    #[pyo3(signature = (tokenizer, template, *, num_blocks, block_size, vocab_size, max_model_len, max_batch, max_batch_tokens,
                        max_queue, eos_token_ids, max_sessions, session_ttl_ms, prefix_cache))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        tokenizer: Option<&Tokenizer>,
        template: Option<&ChatTemplate>,
        num_blocks: u32,
        block_size: u32,
        vocab_size: u32,
        max_model_len: usize,
        max_batch: usize,
        max_batch_tokens: usize,
        max_queue: usize,
        mut eos_token_ids: Vec<u32>,
        max_sessions: usize,
        session_ttl_ms: u64,
        prefix_cache: bool,
    ) -> PyResult<Self> {
        for (name, value) in [("num_blocks", num_blocks), ("block_size", block_size)] {
            if value == 0 {
                let message = format!("{name} must be at least 1, but 0 was given");
                return Err(Error::invalid(name, message).into());
            }
        }
        if u64::from(num_blocks) * u64::from(block_size) > i32::MAX as u64 {
            let message = format!(
                "num_blocks * block_size must be below 2**31, but {num_blocks} * {block_size} was given"
            );
            return Err(Error::invalid("num_blocks", message).into());
        }
        let pool = Arc::new(BlockPool::new(
            num_blocks as usize,
            block_size as usize,
            prefix_cache,
        ));
        let config = SchedulerConfig {
            max_batch,
            max_batch_tokens,
            max_model_len,
            max_queue,
        };
        let scheduler = crate::sched::Scheduler::new(config, pool)?;
        let limits = Limits {
            context_length: scheduler.max_tokens(),
            vocab_size: vocab_size as usize,
            keeps_borders: false,
        };
        eos_token_ids.retain(|&id| id < vocab_size);
        let tokenizer = tokenizer.map(|tokenizer| Arc::clone(&tokenizer.inner));
        let store = SessionStore::new(StoreLimits {
            max_sessions,
            ttl_ms: session_ttl_ms,
        });
        let grammars = Grammars::new(tokenizer.clone(), limits.vocab_size, eos_token_ids.clone());
        Ok(Self {
            grammars,
            state: Mutex::new(State {
                core: Core::new(scheduler, tokenizer.clone(), eos_token_ids),
                output: StepOutput::default(),
                next_request: 1,
            }),
            sessions: Arc::new(Mutex::new(store)),
            tokenizer,
            template: template.map(|template| Arc::clone(&template.0)),
            limits,
        })
    }

    /// Most tokens of a sequence, prompt and output.
    #[getter]
    fn context_length(&self) -> usize {
        self.limits.context_length
    }

    /// Sets a tenant's share relative to the others'.
    fn set_weight(&self, py: Python<'_>, tenant: u32, weight: u32) -> Result<()> {
        self.with_state(py, |state| {
            state.core.scheduler_mut().set_weight(tenant, weight)
        })
    }

    /// Takes one JSON-encoded submission in and returns the request's number.
    fn add(&self, py: Python<'_>, submission: &[u8], random: u64, now_ms: u64) -> Result<u64> {
        let submission = Submission::parse(submission)?;
        if self.tokenizer.is_none() && !submission.stopping.stop.is_empty() {
            return Err(Error::invalid(
                "stop",
                "stop strings need a tokenizer, and this scheduler has none; use stop_token_ids",
            ));
        }
        py.detach(|| self.admit(&submission, random, now_ms))
    }

    /// Decides what the next step computes: each sequence's (request, choice), the arrays and the masks; None if there is nothing
    /// to do.
    #[allow(clippy::type_complexity)]
    fn plan<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<Option<(Vec<(u64, usize)>, Bound<'py, PyDict>, Option<StepMasks>)>> {
        let planned = self.with_state(py, |state| {
            let step = state.core.plan();
            let sequences: Vec<_> = step.scheduled.iter().map(|s| request_of(s.id)).collect();
            (!step.is_empty()).then(|| (sequences, arrays(step), StepMasks::of(step)))
        });
        let Some((sequences, arrays, masks)) = planned else {
            return Ok(None);
        };
        let dict = PyDict::new(py);
        for (name, bytes) in arrays {
            dict.set_item(name, PyByteArray::new(py, &bytes))?;
        }
        Ok(Some((sequences, dict, masks)))
    }

    /// Books the outcome of the planned step: one token for each sampled row.
    fn commit(&self, py: Python<'_>, tokens: Vec<i64>, now_ms: u64) -> Result<Vec<Event>> {
        let vocab_size = self.limits.vocab_size;
        self.with_state(py, move |state| state.commit(&tokens, vocab_size, now_ms))
    }

    /// Books that the planned step could not be computed; it is planned again in halves, until the request at fault is found.
    fn fail(&self, py: Python<'_>, message: &str) -> Vec<Event> {
        let error = Error::internal(message);
        self.with_state(py, |state| {
            let mut collector = Collector::new(0);
            state.core.fail_step(&error, &mut collector);
            collector.events
        })
    }

    /// Ends a request before its time; `keep` commits its session's turn with what was generated.
    fn abort(&self, py: Python<'_>, request: u64, keep: bool, now_ms: u64) -> Vec<Event> {
        let how = if keep {
            Abort::Cancel
        } else {
            Abort::Disconnect
        };
        self.with_state(py, |state| {
            let mut collector = Collector::new(now_ms);
            state.core.abort(request, how, &mut collector);
            collector.events
        })
    }

    /// Drops a session; False if there was none.
    fn end_session(&self, py: Python<'_>, tenant: u32, session_id: SessionId) -> Result<bool> {
        let key = SessionKey::new(tenant, session_id);
        let request = self.with_state(py, State::next_request);
        py.detach(|| {
            let end = TurnGuard::begin_end(&self.sessions, key, request, 0)?;
            Ok(end.map(|end| end.commit(0)).is_some())
        })
    }

    /// Committed token ids of a session.
    fn session_tokens(
        &self,
        py: Python<'_>,
        tenant: u32,
        session_id: SessionId,
    ) -> Result<Vec<u32>> {
        let key = SessionKey::new(tenant, session_id);
        py.detach(|| {
            guard(&self.sessions)
                .state(&key)
                .map(|state| state.tokens.to_vec())
        })
    }

    /// Counters and the state now.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (stats, counts) = self.with_state(py, |state| {
            let scheduler = state.core.scheduler();
            (scheduler.stats(), scheduler.pool().counts())
        });
        let sessions = py.detach(|| guard(&self.sessions).len());
        let dict = PyDict::new(py);
        for (name, value) in [
            ("running", stats.running as u64),
            ("waiting", stats.waiting as u64),
            ("steps", stats.steps),
            ("computed_tokens", stats.computed_tokens),
            ("sampled_tokens", stats.sampled_tokens),
            ("cached_tokens", stats.cached_tokens),
            ("preemptions", stats.preemptions),
            ("recomputed_tokens", stats.recomputed_tokens),
            ("free_blocks", counts.free as u64),
            ("owned_blocks", counts.owned as u64),
            ("cached_blocks", counts.cached as u64),
            ("sessions", sessions as u64),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }
}
