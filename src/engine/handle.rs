//! The engine's interface for callers: submit, watch, stop. Unless its comment says otherwise, a method returns at once.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::admission::Admissions;
use super::clock::now_ms;
use super::config::{EngineConfig, Limits, ModelSpec, Stats};
use super::core::Core;
use super::embed::{EmbedJob, EmbedReply, EmbedSubmission};
use super::embed_tokens::EmbedTokens;
use super::executor::Executor;
use super::grammars::Grammars;
use super::health::engine_down;
use super::inbox::{Command, ReadyRequest, Request};
use super::lanes::prepare_in_lane;
use super::locks::lock;
use super::log_file::LogFile;
use super::log_writer::{Fsync, LogSender, LogWriter, OpenLog};
use super::metrics::render;
use super::pool::{Job, Pool, spawn};
use super::shared::Shared;
use super::stream::Stream;
use super::tiers::{Nudge, TierConfig, Tiers};
use super::turn_guard::TurnGuard;
use super::worker::Worker;
use crate::error::{Error, Result};
use crate::kv::BlockPool;
use crate::panics::caught;
use crate::request::{Input, SessionId, Submission};
use crate::sched::{Scheduler, SchedulerConfig};
use crate::session::{
    AdapterDigest, Lanes, LogFault, SessionKey, SessionLog, SessionStore, TurnBefore, TurnHistory,
};
use crate::tenant::{Accounts, Quota, TenantUsage};
use crate::text::PIECE_BYTES;
use crate::tier::Store;
use crate::wire::{Mailbox, Reply};

/// Number of threads that render and tokenize. The same number of other threads prepare only long texts.
const PREPARING_THREADS: usize = 2;
/// Number of grammars that are compiled at the same time.
const COMPILING_THREADS: usize = 2;

/// A running engine.
pub struct Engine {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: Arc<BlockPool>,
    /// The tiers below it.
    store: Option<Arc<Store>>,
    pub(super) model: ModelSpec,
    pub(super) limits: Limits,
    log: Mutex<Option<LogSender>>,
    preparing: Pool,
    preparing_long: Pool,
    grammars: Arc<Grammars>,
    compiling: Arc<Pool>,
    /// The engine's thread, then that of the session log.
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the threads. Sessions are kept in memory, and end with the engine.
    ///
    /// # Errors
    /// `invalid_value` for sizes that cannot work; `internal_error` where the system gives no thread or descriptor.
    pub fn start(
        config: &EngineConfig,
        model: ModelSpec,
        executor: Box<dyn Executor + Send>,
    ) -> Result<Self> {
        Self::start_with(
            config,
            model,
            executor,
            SessionStore::new(config.sessions),
            None,
        )
    }

    /// Starts the threads, with the sessions of a log. Every further turn is written to the log before its reply ends.
    ///
    /// # Errors
    /// Those of [`Self::start`].
    pub fn start_durable(
        config: &EngineConfig,
        model: ModelSpec,
        executor: Box<dyn Executor + Send>,
        open: OpenLog,
    ) -> Result<Self> {
        let log = Some((open.log, open.fsync));
        Self::start_with(config, model, executor, open.sessions, log)
    }

    fn start_with(
        config: &EngineConfig,
        mut model: ModelSpec,
        executor: Box<dyn Executor + Send>,
        mut sessions: SessionStore,
        log: Option<(SessionLog<LogFile>, Fsync)>,
    ) -> Result<Self> {
        // The sampler suppresses end tokens by their columns of the logits; a token without one is never sampled.
        let rows = model.vocab_size;
        model.eos_tokens.retain(|&id| (id as usize) < rows);
        let mut pool = BlockPool::new(config.num_blocks, config.block_size, config.prefix_cache)
            .with_states(config.state_slots, config.state_every);
        if let Some(sizes) = config.windows {
            pool = pool.with_windows(sizes.window, sizes.num_blocks);
        }
        if config.share_prefix_cache {
            pool = pool.shared_by_tenants();
        }
        // The blocks of layers with a window have no copies below.
        let tiers = config.tiers.as_ref();
        let tiers = tiers.filter(|_| config.prefix_cache && config.windows.is_none());
        if let Some(tiers) = tiers {
            pool = pool.with_names(tiers.roots(config.block_size, config.share_prefix_cache));
        }
        let store = tiers.map(TierConfig::open).transpose()?.map(Arc::new);
        let pool = Arc::new(pool);
        let max_open = config.scheduler.max_batch + config.scheduler.max_queue;
        // Admission limits the open requests. All of them may reach the scheduler before its first step.
        let sizes = SchedulerConfig {
            max_queue: max_open,
            ..config.scheduler
        };
        let mut scheduler = Scheduler::new(sizes, Arc::clone(&pool))?
            .with_policy(config.policy.policy())
            .with_speculation(config.speculation);
        for tenant in &config.tenants {
            scheduler.set_weight(tenant.number, tenant.limits.weight)?;
        }
        let limits = Limits {
            context_length: scheduler.max_tokens(),
            vocab_size: model.vocab_size,
            keeps_borders: config.state_slots > 0 || config.windows.is_some(),
        };
        let max_batch_tokens = config.scheduler.max_batch_tokens;
        for tenant in &config.tenants {
            if let Some(most) = tenant.limits.max_sessions {
                sessions.set_tenant_cap(tenant.number, most);
            }
        }
        let accounts = Accounts::new(&config.tenants, 0);
        let lanes = Lanes::new(config.lanes);
        let shared = Arc::new(Shared::new(
            sessions,
            lanes,
            Admissions::new(max_open, accounts),
            config.stall,
        )?);
        let mut threads = Vec::new();
        if let (Some(tiers), Some(store)) = (tiers, &store) {
            let waiting = Arc::downgrade(&shared);
            let nudge: Nudge = Arc::new(move || {
                if let Some(shared) = waiting.upgrade() {
                    shared.send(Command::Look);
                }
            });
            let sizes = (tiers.block_bytes, tiers.state_bytes);
            let (below, started) = Tiers::start(store, sizes, &nudge)?;
            scheduler = scheduler.with_below(Box::new(below), tiers.saves_at_once());
            threads.extend(started);
        }
        let core = Core::new(scheduler, model.tokenizer.clone(), model.eos_tokens.clone());
        let written = log.map(|(log, fsync)| {
            let (sessions, wake) = (Arc::clone(&shared.sessions), Arc::clone(&shared.wake));
            LogWriter::new(log, sessions, wake, fsync, Arc::clone(&shared.log_counters))
        });
        let (writer, log) = written.unzip();
        let worker = Worker::new(
            Arc::clone(&shared),
            core,
            executor,
            max_batch_tokens,
            log.clone(),
        )?;
        let grammars = Grammars::new(
            model.tokenizer.clone(),
            model.vocab_size,
            model.eos_tokens.clone(),
        );
        threads.push(spawn("lmserve-engine", move || worker.run())?);
        if let Some(writer) = writer {
            threads.push(spawn("lmserve-session-log", move || writer.run())?);
        }
        Ok(Self {
            shared,
            pool,
            store,
            model,
            limits,
            log: Mutex::new(log),
            preparing: Pool::start("lmserve-prepare", PREPARING_THREADS)?,
            preparing_long: Pool::start("lmserve-prepare-long", PREPARING_THREADS)?,
            grammars: Arc::new(grammars),
            compiling: Arc::new(Pool::start("lmserve-grammar", COMPILING_THREADS)?),
            threads: Mutex::new(threads),
        })
    }

    /// Maximum number of tokens of a sequence, prompt and output together.
    pub const fn context_length(&self) -> usize {
        self.limits.context_length
    }

    /// The session log, if there is one.
    pub(super) fn log(&self) -> Option<LogSender> {
        lock(&self.log).clone()
    }

    /// Why the session log cannot be written now; absent while it works, and if there is none.
    pub fn session_log_fault(&self) -> Option<LogFault> {
        self.shared.log_counters.fault()
    }

    /// `long`: it may take long, and so waits only for other long ones.
    fn prepare_later(&self, long: bool, job: Job) -> Result<()> {
        let lane = if long {
            &self.preparing_long
        } else {
            &self.preparing
        };
        lane.run(job).map_err(|_| engine_down("it was stopped"))
    }

    /// Submits a request. `random` seeds its sampling if neither the request nor its session has a seed.
    ///
    /// # Errors
    /// At once: 400 `invalid_value`, 404 `session_not_found`, 409 `session_busy`, 429 `queue_full` or `rate_limit_exceeded`,
    /// 503, and 507 `storage_full` for a session that could not be written to the log. Refusals by the template, the tokenizer, the
    /// lengths or the tenant's tokens come through the stream, before its first byte.
    pub fn submit(&self, json: &[u8], random: u64) -> Result<Stream> {
        let mut submission = Submission::parse(json)?;
        let tenant = submission.tenant;
        submission.priority = self
            .shared
            .admissions
            .accounts()
            .priority(tenant, submission.priority)?;
        if !self.model.can_generate {
            return Err(Error::invalid(
                "model",
                "this model computes embeddings and cannot generate text",
            ));
        }
        let mut open = self
            .shared
            .admit(tenant, submission.n as usize, submission.background)?;
        let (id, record) = (open.id(), open.record());
        let said = self.turn_before(&submission);
        let (lease, base) = match &submission.session {
            None => (None, TurnHistory::empty()),
            Some(_) if said.is_some() => (None, TurnHistory::empty()),
            Some(session) => {
                if let Some(fault) = self.session_log_fault() {
                    return Err(fault.error());
                }
                let key = SessionKey::new(submission.tenant, session.id.clone());
                let (lease, base) =
                    TurnGuard::begin_turn(&self.shared.sessions, key, session, id, now_ms())?;
                (Some(lease), base)
            }
        };
        let adapter = self.shared.adapters.begin(submission.adapter, &base)?;
        submission.adapter = adapter.as_ref().map(|adapter| adapter.number);
        submission.adapter_digest = adapter.as_ref().map(|adapter| adapter.digest);
        open.keep(adapter);
        let seed = submission.sampling.seed.or(base.seed).unwrap_or(random);
        let mailbox = Mailbox::new(id, Arc::clone(&self.shared.wake));
        let mut reply = Reply::new(&submission, Arc::clone(&mailbox))?;
        if let Some(session) = &submission.session
            && session.by_default
            && base.replaced_turns > 0
        {
            reply.warn(dropped(&session.id, base.replaced_turns));
        }
        let long = json.len() > PIECE_BYTES && !matches!(submission.input, Input::Tokens { .. });
        let mut request = Request {
            submission,
            seed,
            lease,
            open,
            reply,
        };
        let (model, limits, shared) = (self.model.clone(), self.limits, Arc::clone(&self.shared));
        let (grammars, compiling) = (Arc::clone(&self.grammars), Arc::clone(&self.compiling));
        let job = move || {
            let open = &request.open;
            let submission = &mut request.submission;
            let prepared = shared.wanted(open).and_then(|()| {
                prepare_in_lane(
                    submission,
                    base,
                    &shared.lanes,
                    model.tokenizer.as_deref(),
                    model.template.as_deref(),
                    limits,
                    &|| shared.wanted(open),
                )
            });
            let prepared = prepared.map(|prepared| match said {
                Some(said) => prepared.saying_again(said, limits),
                None => prepared,
            });
            // Without a limit it may end soon, so its generated tokens are charged at its end.
            let limited = submission.stopping.max_tokens.is_some();
            let choices = submission.n as usize;
            let reserved = prepared.and_then(|prepared| {
                let output = if limited { prepared.max_tokens } else { 0 };
                let open = &mut request.open;
                open.reserve(prepared.input_tokens, output * choices)
                    .map(|()| prepared)
            });
            match reserved {
                Ok(prepared) => {
                    let ready = Box::new(ReadyRequest { request, prepared });
                    return guide_and_send(ready, grammars, &compiling, shared);
                }
                Err(_) if request.open.aborted().is_some() => request.abort(),
                Err(error) => request.fail(error),
            }
            shared.wake.signal();
        };
        let stream = Stream {
            mailbox,
            shared: Arc::clone(&self.shared),
            record,
        };
        self.prepare_later(long, Box::new(job))?;
        Ok(stream)
    }

    /// The turn that a request asks for again.
    fn turn_before(&self, submission: &Submission) -> Option<TurnBefore> {
        let (session, turn) = (submission.session.as_ref()?, submission.turn_key?);
        let key = SessionKey::new(submission.tenant, session.id.clone());
        let sessions = lock(&self.shared.sessions);
        sessions.state(&key).ok()?.turn_before(turn)
    }

    /// Submits an embedding request. The stream has the whole reply.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn embed(&self, json: &[u8]) -> Result<Stream> {
        let size = self.model.embedding_size;
        let submission = EmbedSubmission::parse(json, size)?;
        if !self.model.can_embed {
            return Err(Error::invalid(
                "model",
                "this model cannot compute embeddings",
            ));
        }
        let open = self
            .shared
            .admit(submission.tenant, 1, submission.background)?;
        let mailbox = Mailbox::new(open.id(), Arc::clone(&self.shared.wake));
        let stream = Stream {
            mailbox: Arc::clone(&mailbox),
            shared: Arc::clone(&self.shared),
            record: open.record(),
        };
        let (model, shared) = (self.model.clone(), Arc::clone(&self.shared));
        let long = json.len() > PIECE_BYTES;
        let reply = EmbedReply::new(mailbox);
        let job = move || {
            // Captured as a whole, so that a panic drops them in the order of the job's fields.
            let (mut open, reply) = (open, reply);
            let wanted = || shared.wanted(&open);
            let tokens = EmbedTokens {
                tokenizer: model.tokenizer.as_deref(),
                max_len: model.max_embed_len,
                vocab_size: model.vocab_size,
                fields: &submission.fields,
                wanted: &wanted,
            };
            let tokenized = tokens.of(&submission);
            let reserved = tokenized.and_then(|sequences| {
                let tokens = sequences.iter().map(Vec::len).sum();
                open.reserve(tokens, 0).map(|()| sequences)
            });
            match reserved {
                Ok(sequences) => {
                    let job = EmbedJob::new(submission, sequences, size, open, reply);
                    shared.send(Command::Embed(Box::new(job)));
                }
                Err(error) => {
                    drop(open);
                    reply.fail(error);
                    shared.wake.signal();
                }
            }
        };
        self.prepare_later(long, Box::new(job))?;
        Ok(stream)
    }

    /// Lets requests use an adapter that the model has loaded.
    ///
    /// # Errors
    /// `invalid_value` (400) for a number that is none, or is taken.
    pub fn add_adapter(&self, number: u32, name: String, digest: AdapterDigest) -> Result<()> {
        self.shared.adapters.add(number, name, digest)
    }

    /// Lets no further request use an adapter, so that the model can forget it.
    ///
    /// # Errors
    /// `adapter_in_use` (409) while requests use it; 404 where there is none of this number.
    pub fn remove_adapter(&self, number: u32) -> Result<()> {
        self.shared.adapters.remove(number)
    }

    /// What a tenant has used, and what it may still use.
    pub fn usage(&self, tenant: u32) -> TenantUsage {
        let now_ms = self.shared.admissions.uptime_ms();
        self.shared.admissions.accounts().usage(tenant, now_ms)
    }

    /// What a tenant may still use now.
    pub fn quota(&self, tenant: u32) -> Quota {
        let now_ms = self.shared.admissions.uptime_ms();
        self.shared.admissions.accounts().quota(tenant, now_ms)
    }

    /// Whether the engine is working.
    ///
    /// # Errors
    /// 503: `engine_unavailable` once one of its threads has ended, at the latest when it is stopped; `engine_stalled` after too
    /// long without a step while work waits.
    pub fn check_health(&self) -> Result<()> {
        self.shared.health.check_up()?;
        let pools = [&self.preparing, &self.preparing_long, &*self.compiling];
        let threads = lock(&self.threads);
        if threads.iter().any(JoinHandle::is_finished) || !pools.into_iter().all(Pool::is_whole) {
            return Err(engine_down("one of its threads has ended"));
        }
        self.shared.health.check()
    }

    /// Counters, gauges and latencies in Prometheus' text format.
    pub fn metrics(&self) -> String {
        render(&self.stats(), &self.shared.admissions.latencies())
    }

    /// A descriptor that is readable while a stream has new bytes.
    pub fn wake_fd(&self) -> i32 {
        self.shared.wake.fd()
    }

    /// Takes the ids of the streams with new bytes.
    pub fn drain(&self) -> Vec<u64> {
        self.shared.wake.drain()
    }

    /// The state at the last step; requests and sessions as they are now.
    pub fn stats(&self) -> Stats {
        let log = &self.shared.log_counters;
        Stats {
            open_requests: self.shared.admissions.len(),
            sessions: lock(&self.shared.sessions).len(),
            lanes: lock(&self.shared.lanes).len(),
            log_bytes: log.bytes.load(Ordering::Relaxed),
            log_failures: log.failures.load(Ordering::Relaxed),
            log_rewrites: log.rewrites.load(Ordering::Relaxed),
            log_faulty: self.session_log_fault().is_some(),
            panics: caught(),
            healthy: self.check_health().is_ok(),
            stalled_ms: self.shared.health.waited().as_millis() as u64,
            tiers: self
                .store
                .as_ref()
                .map(|store| store.stats())
                .unwrap_or_default(),
            ..*lock(&self.shared.stats)
        }
    }

    /// Refuses new requests, waits up to `grace` for open ones, aborts the rest, and stops the threads. May be called again.
    pub fn shutdown(&self, grace: Duration) {
        self.shared.admissions.drain(grace);
        self.shared.stop_preparing();
        self.shared.send(Command::Stop);
        lock(&self.log).take();
        let pools = [&self.preparing, &self.preparing_long, &*self.compiling];
        let well = pools.map(Pool::stop);
        let threads = std::mem::take(&mut *lock(&self.threads));
        let ends: Vec<_> = threads.into_iter().map(JoinHandle::join).collect();
        if well.contains(&false) || ends.iter().any(Result::is_err) {
            self.shared.health.set_down("a thread panicked");
        }
    }
}

/// Sends a prepared request to the engine's thread, with its matchers if it follows a grammar. A grammar that is not compiled yet
/// is compiled on `compiling`, so that it delays no other request's preparation.
fn guide_and_send(
    mut ready: Box<ReadyRequest>,
    grammars: Arc<Grammars>,
    compiling: &Pool,
    shared: Arc<Shared>,
) {
    let answer = &ready.prepared.answer;
    ready.request.reply.expect(answer);
    let Some(grammar) = ready.prepared.grammar.take() else {
        return shared.send(Command::Run(ready));
    };
    let choices = ready.request.submission.n as usize;
    if let Some(matchers) = grammars.cached(&grammar, choices) {
        ready.prepared.matchers = matchers;
        return shared.send(Command::Run(ready));
    }
    let compile = move || match grammars.matchers(&grammar, choices) {
        Ok(matchers) => {
            ready.prepared.matchers = matchers;
            shared.send(Command::Run(ready));
        }
        Err(error) => {
            Command::Run(ready).reject(&error);
            shared.wake.signal();
        }
    };
    if let Err(compile) = compiling.run(Box::new(compile)) {
        // The engine is stopping, and the request gets an error.
        compile();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown(Duration::ZERO);
    }
}

/// The warning for a client whose request began a session anew only by default.
fn dropped(id: &SessionId, turns: usize) -> String {
    let noun = if turns == 1 { "turn" } else { "turns" };
    format!(
        "this request dropped session {id} with its {turns} {noun}: it left out sequence_start, whose default is \
         true; to continue a session, send sequence_start false or use POST /v1/sessions/{id}/turns"
    )
}
