//! The start of an engine: creates everything from the settings, and starts the threads.

use std::sync::{Arc, Mutex};

use super::admission::Admissions;
use super::config::{EngineConfig, Limits, ModelSpec};
use super::core::Core;
use super::executor::Executor;
use super::grammars::Grammars;
use super::handle::Engine;
use super::inbox::Command;
use super::log_file::LogFile;
use super::log_writer::{Fsync, LogSender, LogWriter, OpenLog};
use super::pool::{Pool, spawn};
use super::shared::Shared;
use super::store_writer::{SharedStore, StoreWriter};
use super::tiers::{Nudge, TierConfig, Tiers};
use super::worker::Worker;
use crate::error::Result;
use crate::kv::BlockPool;
use crate::sched::{Scheduler, SchedulerConfig};
use crate::session::{Lanes, SessionLog, SessionStore};
use crate::tenant::Accounts;

/// Number of threads that render and tokenize. The same number of other threads prepare only long texts.
const PREPARING_THREADS: usize = 2;
/// Number of grammars that are compiled at the same time.
const COMPILING_THREADS: usize = 2;

/// Where finished turns are written.
enum Durable {
    Nothing,
    Log(Box<(SessionLog<LogFile>, Fsync)>),
    Store(Box<dyn SharedStore>),
}

impl Durable {
    /// The work of the writing thread, and the sender of turns to it.
    fn writer(self, shared: &Shared) -> Option<(Box<dyn FnOnce() + Send>, LogSender)> {
        let (wake, counters) = (Arc::clone(&shared.wake), Arc::clone(&shared.log_counters));
        match self {
            Self::Nothing => None,
            Self::Log(log) => {
                let (log, fsync) = *log;
                let sessions = Arc::clone(&shared.sessions);
                let (writer, sender) = LogWriter::new(log, sessions, wake, fsync, counters);
                Some((Box::new(move || writer.run()), sender))
            }
            Self::Store(store) => {
                let (writer, sender) = StoreWriter::new(store, wake, counters);
                Some((Box::new(move || writer.run()), sender))
            }
        }
    }
}

impl Engine {
    /// Starts the engine with sessions in memory, which are lost when it ends.
    ///
    /// # Errors
    /// `invalid_value` for settings that cannot work; `internal_error` if the system provides no thread or descriptor.
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
            Durable::Nothing,
        )
    }

    /// Starts the engine with the sessions of a log. Each turn is written to the log before its reply ends.
    ///
    /// # Errors
    /// Those of [`Self::start`].
    pub fn start_durable(
        config: &EngineConfig,
        model: ModelSpec,
        executor: Box<dyn Executor + Send>,
        open: OpenLog,
    ) -> Result<Self> {
        let log = Durable::Log(Box::new((open.log, open.fsync)));
        Self::start_with(config, model, executor, open.sessions, log)
    }

    /// Starts the engine. Each turn is written to a store that other servers share before its reply ends.
    ///
    /// # Errors
    /// Those of [`Self::start`].
    pub fn start_shared(
        config: &EngineConfig,
        model: ModelSpec,
        executor: Box<dyn Executor + Send>,
        store: Box<dyn SharedStore>,
    ) -> Result<Self> {
        let sessions = SessionStore::new(config.sessions);
        Self::start_with(config, model, executor, sessions, Durable::Store(store))
    }

    fn start_with(
        config: &EngineConfig,
        mut model: ModelSpec,
        executor: Box<dyn Executor + Send>,
        mut sessions: SessionStore,
        durable: Durable,
    ) -> Result<Self> {
        // The sampler suppresses end tokens by their columns of the logits. A token without a column is never sampled.
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
        // The tiers do not store blocks of layers with a sliding window.
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
        let (writer, log) = durable.writer(&shared).unzip();
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
            threads.push(spawn("lmserve-session-log", writer)?);
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
}
