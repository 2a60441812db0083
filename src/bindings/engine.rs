//! The engine as a Python class.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::executor::PyExecutor;
use super::session_log::{OpenSessionLog, store_limits};
use super::session_state::{Exported, ImportedTurn, exported, imported, info_dict};
use super::session_store::PyStore;
use super::stream::Stream;
use super::text::{ChatTemplate, Tokenizer};
use super::tiers::GivenTiers;
use crate::engine::{self, EngineConfig, ModelSpec, WindowSizes};
use crate::request::SessionId;
use crate::sched::{SchedulerConfig, Speculation};
use crate::session::{LaneLimits, SessionKey};
use crate::tenant::{Quota, Tenant};

/// The continuous-batching engine over one model. Its threads start with it; `shutdown` ends them.
#[pyclass(frozen, module = "lmserve._core", weakref)]
pub struct Engine {
    inner: Arc<engine::Engine>,
    random: RandomState,
    submitted: AtomicU64,
}

/// Assumed marginal time of one sampled row, as a share of a step's fixed time, until steps have been measured. On the CPU it is close
/// to the measured value (benchmarks/results.md). Elsewhere it is small, because a decode step there waits for memory.
const fn row_cost(on_cpu: bool) -> f32 {
    if on_cpu { 0.3 } else { 0.01 }
}

/// Stops an engine before the interpreter ends: a thread that asks for the GIL after that takes the process down.
#[pyclass(frozen)]
struct StopAtExit(Weak<engine::Engine>);

#[pymethods]
impl StopAtExit {
    fn __call__(&self, py: Python<'_>) {
        if let Some(engine) = self.0.upgrade() {
            py.detach(|| engine.shutdown(Duration::ZERO));
        }
    }
}

fn key(tenant: u32, id: SessionId) -> SessionKey {
    SessionKey::new(tenant, id)
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (runner, tokenizer, template, *, eos_token_ids, max_queue = 1024, max_sessions = 100_000, session_ttl = 0.0, speculate = 0, policy = "fair", prefix_cache = true, share_prefix_cache = false, session_log = None, session_store = None, tenants = None, stall_seconds = 5.0, state_every = 2048, tiers = None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        runner: &Bound<'_, PyAny>,
        tokenizer: Option<&Tokenizer>,
        template: Option<&ChatTemplate>,
        eos_token_ids: Vec<u32>,
        max_queue: usize,
        max_sessions: usize,
        session_ttl: f64,
        speculate: usize,
        policy: &str,
        prefix_cache: bool,
        share_prefix_cache: bool,
        session_log: Option<&OpenSessionLog>,
        session_store: Option<Bound<'_, PyAny>>,
        tenants: Option<&[u8]>,
        stall_seconds: f64,
        state_every: usize,
        tiers: Option<GivenTiers>,
    ) -> PyResult<Self> {
        let info = runner.getattr("info")?;
        let size = |name: &str| -> PyResult<usize> { info.getattr(name)?.extract() };
        let flag = |name: &str| -> PyResult<bool> { info.getattr(name)?.extract() };
        let on_cpu = info.getattr("device")?.extract::<String>()? == "cpu";
        let executor = Box::new(PyExecutor::new(runner)?);
        let drafts = speculate > 0 || executor.guesses();
        let speculation = drafts.then(|| Speculation {
            max_draft: speculate,
            max_rows: executor.max_rows(),
            row_cost: row_cost(on_cpu),
        });
        let config = EngineConfig {
            scheduler: SchedulerConfig {
                max_batch: size("max_batch")?,
                max_batch_tokens: size("max_batch_tokens")?,
                max_model_len: size("max_model_len")?,
                max_queue,
            },
            policy: policy.parse()?,
            speculation,
            state_slots: size("state_slots")?,
            state_every,
            num_blocks: size("num_blocks")?,
            windows: (size("num_window_blocks")? > 0).then_some(WindowSizes {
                window: size("window")?,
                num_blocks: size("num_window_blocks")?,
            }),
            block_size: size("block_size")?,
            prefix_cache,
            share_prefix_cache,
            tiers: tiers.map(|tiers| tiers.config(runner)).transpose()?,
            sessions: store_limits(max_sessions, session_ttl)?,
            lanes: LaneLimits::default(),
            tenants: Tenant::parse_list(tenants.unwrap_or(b"[]"))?,
            stall: Duration::from_secs_f64(stall_seconds.clamp(0.0, 86_400.0)),
        };
        let model = ModelSpec {
            tokenizer: tokenizer.map(|tokenizer| Arc::clone(&tokenizer.inner)),
            template: template.map(|template| Arc::clone(&template.0)),
            eos_tokens: eos_token_ids,
            vocab_size: size("vocab_size")?,
            embedding_size: size("embedding_size")?,
            max_embed_len: size("max_model_len")?,
            can_generate: flag("can_generate")?,
            can_embed: flag("can_embed")?,
        };
        let inner = match session_log.map(OpenSessionLog::take).transpose()? {
            Some(log) => engine::Engine::start_durable(&config, model, executor, log)?,
            None => match session_store {
                None => engine::Engine::start(&config, model, executor)?,
                Some(store) => {
                    let store = Box::new(PyStore::new(store.unbind()));
                    engine::Engine::start_shared(&config, model, executor, store)?
                }
            },
        };
        let inner = Arc::new(inner);
        let stop = Py::new(runner.py(), StopAtExit(Arc::downgrade(&inner)))?;
        runner
            .py()
            .import("atexit")?
            .call_method1("register", (stop,))?;
        Ok(Self {
            inner,
            random: RandomState::new(),
            submitted: AtomicU64::new(0),
        })
    }

    /// Most tokens of a sequence, prompt and output.
    #[getter]
    fn context_length(&self) -> usize {
        self.inner.context_length()
    }

    /// Takes one JSON-encoded submission in and returns at once.
    fn submit(&self, submission: &[u8]) -> PyResult<Stream> {
        // Distinct for each request of a process and unpredictable from outside; a client that wants it fixed sends a seed.
        let random = self
            .random
            .hash_one(self.submitted.fetch_add(1, Ordering::Relaxed));
        Ok(Stream {
            inner: self.inner.submit(submission, random)?,
        })
    }

    /// Takes one JSON-encoded embedding request in and returns at once.
    fn embed(&self, submission: &[u8]) -> PyResult<Stream> {
        Ok(Stream {
            inner: self.inner.embed(submission)?,
        })
    }

    /// Ends the running turn of a session with what it has; False if none runs.
    fn cancel_session(&self, tenant: u32, session_id: SessionId) -> bool {
        self.inner.cancel_session(&key(tenant, session_id))
    }

    /// Drops a session, after the end of its running turn if that is cancelled; False if there was none.
    #[pyo3(signature = (tenant, session_id, cancel = false))]
    fn end_session(
        &self,
        py: Python<'_>,
        tenant: u32,
        session_id: SessionId,
        cancel: bool,
    ) -> PyResult<bool> {
        let key = key(tenant, session_id);
        Ok(py.detach(|| {
            if cancel {
                self.inner.cancel_and_end_session(&key)
            } else {
                self.inner.end_session(&key)
            }
        })?)
    }

    /// Makes a session of its own that stands where another stands, or stood after its first turns.
    #[pyo3(signature = (tenant, session_id, new_id, turns = None))]
    fn fork_session(
        &self,
        py: Python<'_>,
        tenant: u32,
        session_id: SessionId,
        new_id: SessionId,
        turns: Option<usize>,
    ) -> PyResult<()> {
        Ok(py.detach(|| {
            self.inner
                .fork_session(&key(tenant, session_id), new_id, turns)
        })?)
    }

    /// Takes a session back to where it stood after its first turns.
    fn rewind_session(
        &self,
        py: Python<'_>,
        tenant: u32,
        session_id: SessionId,
        turns: usize,
    ) -> PyResult<()> {
        Ok(py.detach(|| self.inner.rewind_session(&key(tenant, session_id), turns))?)
    }

    /// Committed turns and tokens of a session, how many are cached, and whether a turn runs.
    fn session_info<'py>(
        &self,
        py: Python<'py>,
        tenant: u32,
        session_id: SessionId,
    ) -> PyResult<Bound<'py, PyDict>> {
        let key = key(tenant, session_id);
        let dict = info_dict(py, &self.inner.session_info(&key)?)?;
        dict.set_item("cached_tokens", self.inner.session_cached_tokens(&key)?)?;
        Ok(dict)
    }

    /// The sessions of a tenant in order of their ids, those behind `after`, at most `limit`.
    fn list_sessions<'py>(
        &self,
        py: Python<'py>,
        tenant: u32,
        after: Option<SessionId>,
        limit: usize,
    ) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let page = self.inner.list_sessions(tenant, after, limit);
        page.iter().map(|info| info_dict(py, info)).collect()
    }

    /// Tokens of the prompt that a submission would be computed for; nothing is.
    fn count_tokens(&self, py: Python<'_>, submission: &[u8]) -> PyResult<usize> {
        Ok(py.detach(|| self.inner.count_tokens(submission))?)
    }

    /// Committed token ids of a session.
    fn session_tokens(&self, tenant: u32, session_id: SessionId) -> PyResult<Vec<u32>> {
        let state = self.inner.session_state(&key(tenant, session_id))?;
        Ok(state.tokens.to_vec())
    }

    /// (input text, output text, input token ids, output token ids) of each committed turn.
    #[allow(clippy::type_complexity)]
    fn session_transcript(
        &self,
        py: Python<'_>,
        tenant: u32,
        session_id: SessionId,
    ) -> PyResult<Vec<(String, String, Vec<u32>, Vec<u32>)>> {
        let turns = py.detach(|| self.inner.session_transcript(&key(tenant, session_id)))?;
        Ok(turns
            .into_iter()
            .map(|turn| (turn.input, turn.output, turn.input_ids, turn.output_ids))
            .collect())
    }

    /// Keeps an idle session and its KV for so long, where others can make room; 0: no longer.
    fn hold_session(&self, tenant: u32, session_id: SessionId, hold_ms: u64) -> PyResult<()> {
        Ok(self.inner.hold_session(&key(tenant, session_id), hold_ms)?)
    }

    /// Gives up what is cached of a session and of nothing else. Returns how many of its tokens are cached then.
    fn give_up_session(
        &self,
        py: Python<'_>,
        tenant: u32,
        session_id: SessionId,
    ) -> PyResult<usize> {
        let key = key(tenant, session_id);
        Ok(py.detach(|| self.inner.give_up_session(&key))?)
    }

    /// All that makes a session: (token ids, (input tokens, output tokens, open, log-probabilities) of each turn, seed, tokens of
    /// the system prompt, the adapter's digest or None). Numbers are little-endian, of four bytes each.
    fn export_session<'py>(
        &self,
        py: Python<'py>,
        tenant: u32,
        session_id: SessionId,
    ) -> PyResult<Exported<'py>> {
        let state = self.inner.committed_state(&key(tenant, session_id))?;
        Ok(exported(py, &state))
    }

    /// Makes a session of what `export_session` gave.
    #[pyo3(signature = (tenant, session_id, tokens, turns, seed, system_tokens, adapter=None))]
    #[allow(clippy::too_many_arguments)]
    fn import_session(
        &self,
        py: Python<'_>,
        tenant: u32,
        session_id: SessionId,
        tokens: &[u8],
        turns: Vec<ImportedTurn>,
        seed: u64,
        system_tokens: usize,
        adapter: Option<[u8; 32]>,
    ) -> PyResult<()> {
        let key = key(tenant, session_id);
        let work = || {
            let commit = imported(tokens, turns, seed, system_tokens, adapter)?;
            self.inner.import_session(&key, commit)
        };
        Ok(py.detach(work)?)
    }

    /// Makes a session of the records that `write` of a session store was given, the oldest first, whatever it was before.
    fn restore_session(
        &self,
        py: Python<'_>,
        tenant: u32,
        session_id: SessionId,
        records: Vec<Vec<u8>>,
    ) -> PyResult<()> {
        let key = key(tenant, session_id);
        Ok(py.detach(|| self.inner.restore_session(&key, records))?)
    }

    /// Lets requests use an adapter that the model has loaded, whose contents have this digest.
    fn add_adapter(&self, number: u32, name: String, digest: [u8; 32]) -> PyResult<()> {
        Ok(self.inner.add_adapter(number, name, digest)?)
    }

    /// Lets no further request use an adapter.
    fn remove_adapter(&self, number: u32) -> PyResult<()> {
        Ok(self.inner.remove_adapter(number)?)
    }

    /// A file descriptor that is readable while some stream has news.
    fn wake_fd(&self) -> i32 {
        self.inner.wake_fd()
    }

    /// Takes the ids of the streams with news.
    fn drain(&self) -> Vec<u64> {
        self.inner.drain()
    }

    /// (code, message) of why nothing can be written to the session log now; None while it is well, and where there is none.
    fn session_log_fault(&self) -> Option<(&'static str, String)> {
        let fault = self.inner.session_log_fault()?;
        Some((fault.code(), fault.message()))
    }

    /// Counters and the state at the last step.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.inner.stats();
        let dict = PyDict::new(py);
        for (name, value) in [
            ("running", stats.scheduler.running as u64),
            ("waiting", stats.scheduler.waiting as u64),
            ("steps", stats.scheduler.steps),
            ("computed_tokens", stats.scheduler.computed_tokens),
            ("sampled_tokens", stats.scheduler.sampled_tokens),
            ("cached_tokens", stats.scheduler.cached_tokens),
            ("preemptions", stats.scheduler.preemptions),
            ("recomputed_tokens", stats.scheduler.recomputed_tokens),
            ("drafted_tokens", stats.scheduler.drafted_tokens),
            ("accepted_tokens", stats.scheduler.accepted_tokens),
            ("mtp_drafted_tokens", stats.scheduler.mtp_drafted_tokens),
            ("mtp_accepted_tokens", stats.scheduler.mtp_accepted_tokens),
            ("free_blocks", stats.free_blocks as u64),
            ("owned_blocks", stats.owned_blocks as u64),
            ("cached_blocks", stats.cached_blocks as u64),
            ("evictions", stats.evictions),
            ("free_states", stats.states.free as u64),
            ("owned_states", stats.states.owned as u64),
            ("snapshots", stats.states.snapshots as u64),
            ("snapshots_taken", stats.snapshots.taken),
            ("snapshot_hits", stats.snapshots.hits),
            ("snapshot_evictions", stats.snapshots.evictions),
            ("host_entries", stats.tiers.host.entries),
            ("host_hits", stats.tiers.host.hits),
            ("host_failures", stats.tiers.host.failures),
            ("disk_entries", stats.tiers.disk.entries),
            ("disk_hits", stats.tiers.disk.hits),
            ("disk_failures", stats.tiers.disk.failures),
            ("failed_steps", stats.failed_steps),
            ("open_requests", stats.open_requests as u64),
            ("sessions", stats.sessions as u64),
            ("lanes", stats.lanes as u64),
            ("session_log_bytes", stats.log_bytes),
            ("session_log_failures", stats.log_failures),
            ("session_log_rewrites", stats.log_rewrites),
            ("session_log_faulty", u64::from(stats.log_faulty)),
            ("panics", stats.panics),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    /// What a tenant has used since the start, what it does now, and what it may still do; None: no limit.
    fn usage<'py>(&self, py: Python<'py>, tenant: u32) -> PyResult<Bound<'py, PyDict>> {
        let usage = self.inner.usage(tenant);
        let dict = PyDict::new(py);
        dict.set_item("requests", usage.requests)?;
        dict.set_item("prompt_tokens", usage.prompt_tokens)?;
        dict.set_item("cached_tokens", usage.cached_tokens)?;
        dict.set_item("completion_tokens", usage.completion_tokens)?;
        dict.set_item("in_flight", usage.in_flight)?;
        dict.set_item("waiting", usage.waiting)?;
        let limits = PyDict::new(py);
        limits.set_item("weight", usage.limits.weight)?;
        limits.set_item("max_in_flight", usage.limits.max_in_flight)?;
        limits.set_item("tokens_per_minute", usage.limits.tokens_per_minute)?;
        limits.set_item("max_sessions", usage.limits.max_sessions)?;
        limits.set_item("max_priority", usage.limits.max_priority)?;
        dict.set_item("limits", limits)?;
        dict.set_item("remaining", quota(py, usage.quota)?)?;
        Ok(dict)
    }

    /// What a tenant may still do now, of what is limited, by the names that errors have for these numbers.
    fn quota<'py>(&self, py: Python<'py>, tenant: u32) -> PyResult<Bound<'py, PyDict>> {
        quota(py, self.inner.quota(tenant))
    }

    /// Raises `LmserveError` (503) while the engine does not do its work.
    fn check_health(&self) -> PyResult<()> {
        Ok(self.inner.check_health()?)
    }

    /// Counters, gauges and latencies in Prometheus' text format.
    fn metrics(&self) -> String {
        self.inner.metrics()
    }

    /// Refuses new requests, waits up to `grace_seconds` for open ones, gives up the rest and ends the threads.
    fn shutdown(&self, py: Python<'_>, grace_seconds: f64) {
        // The engine's thread needs the GIL to finish its step.
        py.detach(|| {
            self.inner
                .shutdown(Duration::from_secs_f64(grace_seconds.clamp(0.0, 86_400.0)));
        });
    }
}

/// The numbers of a quota that there are, by the names that errors have for them.
fn quota(py: Python<'_>, quota: Quota) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    if let Some((limit, remaining)) = quota.requests {
        dict.set_item("limit_requests", limit)?;
        dict.set_item("remaining_requests", remaining)?;
    }
    if let Some((limit, remaining)) = quota.tokens {
        dict.set_item("limit_tokens", limit)?;
        dict.set_item("remaining_tokens", remaining)?;
        dict.set_item("reset_tokens_ms", quota.reset_tokens_ms)?;
    }
    Ok(dict)
}

impl Drop for Engine {
    fn drop(&mut self) {
        Python::attach(|py| self.shutdown(py, 0.0));
    }
}
