//! What the callers, the preparing pool and the engine's thread share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::adapters::Adapters;
use super::admission::{Admission, Admissions};
use super::config::Stats;
use super::events::Abort;
use super::health::{Health, engine_down};
use super::inbox::{Command, Inbox};
use super::log_writer::LogCounters;
use crate::error::{Error, Kind, Result};
use crate::session::{Lanes, SessionStore};
use crate::wire::Wake;

/// What the callers, the preparing pool and the engine's thread share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) inbox: Inbox,
    pub(super) wake: Arc<Wake>,
    pub(super) sessions: Arc<Mutex<SessionStore>>,
    pub(super) lanes: Arc<Mutex<Lanes>>,
    pub(super) log_counters: Arc<LogCounters>,
    pub(super) admissions: Arc<Admissions>,
    pub(super) adapters: Arc<Adapters>,
    /// Requests that are being prepared are dropped.
    stopping: AtomicBool,
    pub(super) health: Health,
    pub(super) stats: Mutex<Stats>,
}

impl Shared {
    pub(super) fn new(
        sessions: SessionStore,
        lanes: Lanes,
        admissions: Admissions,
        stall: Duration,
    ) -> Result<Self> {
        Ok(Self {
            inbox: Inbox::default(),
            wake: Arc::new(Wake::new()?),
            sessions: Arc::new(Mutex::new(sessions)),
            lanes: Arc::new(Mutex::new(lanes)),
            log_counters: Arc::default(),
            admissions: Arc::new(admissions),
            adapters: Arc::default(),
            stopping: AtomicBool::new(false),
            health: Health::new(stall),
            stats: Mutex::default(),
        })
    }

    /// Admits a request of `choices` sequences.
    ///
    /// # Errors
    /// 503 `engine_unavailable`; those of [`Admissions::admit`].
    pub(super) fn admit(&self, tenant: u32, choices: usize, background: bool) -> Result<Admission> {
        self.health.check_up()?;
        self.admissions.admit(tenant, choices, background)
    }

    /// Drops the requests that are being prepared.
    pub(super) fn stop_preparing(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Whether the preparation of a request should continue.
    ///
    /// # Errors
    /// `engine_unavailable` (503) once the engine stops; `request_aborted` (503) once it is aborted (no client reads it).
    pub(super) fn wanted(&self, open: &Admission) -> Result<()> {
        if self.stopping.load(Ordering::Acquire) {
            return Err(engine_down("it was stopped"));
        }
        if open.aborted().is_some() {
            let message = "the request was aborted";
            return Err(Error::new(Kind::Unavailable, "request_aborted", message));
        }
        Ok(())
    }

    /// Passes a command to the engine's thread. If that thread has ended, the command's request fails.
    pub(super) fn send(&self, command: Command) {
        if let Err(command) = self.inbox.send(command) {
            command.reject(&engine_down("it was stopped"));
            self.wake.signal();
        }
    }

    /// Tells the engine's thread to end a request early. Returns false if it has ended.
    pub(super) fn abort(&self, request: u64, how: Abort) -> bool {
        let open = self.admissions.abort(request, how);
        if open {
            self.send(Command::Abort(request));
        }
        open
    }
}
