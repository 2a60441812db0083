//! The engine as its callers hold it: watched and stopped here, started in `start.rs`, asked in `submit.rs`. Unless its comment says otherwise, a method returns at once.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::config::{Limits, ModelSpec, Stats};
use super::grammars::Grammars;
use super::health::engine_down;
use super::inbox::Command;
use super::locks::lock;
use super::log_writer::LogSender;
use super::metrics::render;
use super::pool::{Pool, join};
use super::shared::Shared;
use crate::error::Result;
use crate::kv::BlockPool;
use crate::panics::caught;
use crate::session::{AdapterDigest, LogFault};
use crate::tenant::{Quota, TenantUsage};
use crate::tier::Store;

/// A running engine.
pub struct Engine {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: Arc<BlockPool>,
    /// The tiers below the pool.
    pub(super) store: Option<Arc<Store>>,
    pub(super) model: ModelSpec,
    pub(super) limits: Limits,
    pub(super) log: Mutex<Option<LogSender>>,
    pub(super) preparing: Pool,
    pub(super) preparing_long: Pool,
    pub(super) grammars: Arc<Grammars>,
    pub(super) compiling: Arc<Pool>,
    /// The engine's thread, the threads of the tiers, and that of the session log.
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Engine {
    /// Maximum number of tokens of a sequence, prompt and output together.
    pub const fn context_length(&self) -> usize {
        self.limits.context_length
    }

    /// The session log, if there is one.
    pub(super) fn log(&self) -> Option<LogSender> {
        lock(&self.log).clone()
    }

    /// Why the session log cannot be written now. Absent if it can, or if there is no log.
    pub fn session_log_fault(&self) -> Option<LogFault> {
        self.shared.log_counters.fault()
    }

    /// Lets requests use an adapter that the model has loaded.
    ///
    /// # Errors
    /// `invalid_value` (400) for a number that is out of range or taken.
    pub fn add_adapter(&self, number: u32, name: String, digest: AdapterDigest) -> Result<()> {
        self.shared.adapters.add(number, name, digest)
    }

    /// Lets no new request use an adapter, so that the model can unload it.
    ///
    /// # Errors
    /// `adapter_in_use` (409) while requests use it; 404 if no adapter has this number.
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
    /// 503: `engine_unavailable` if one of its threads has ended, as they do when it is stopped; `engine_stalled` if work has
    /// waited too long for a step.
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

    /// Returns the ids of the streams with new bytes, each once.
    pub fn drain(&self) -> Vec<u64> {
        self.shared.wake.drain()
    }

    /// The numbers of the last step; those of requests and sessions are current.
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
        let joined = join(&self.threads);
        if well.contains(&false) || !joined {
            self.shared.health.set_down("a thread panicked");
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown(Duration::ZERO);
    }
}
