//! What the callers, the preparing pool and the engine's thread share: the inbox, the open requests, the sessions.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::config::Stats;
use super::core::{Abort, engine_down};
use super::embed::EmbedJob;
use super::health::Health;
use super::lease::TurnLease;
use super::log_writer::LogCounters;
use super::metrics::Latencies;
use super::open::{OpenRequest, OpenRequests};
use super::prepare::Prepared;
use crate::error::{Error, Kind, Result};
use crate::request::Submission;
use crate::sched::FinishReason;
use crate::session::SessionStore;
use crate::tenant::Accounts;
use crate::wire::{Delta, Reply, Usage, Wake};

pub(super) enum Command {
    Run(Box<ReadyRequest>),
    Embed(Box<EmbedJob>),
    Abort(u64),
    Stop,
}

/// A request on its way to the engine's thread.
pub(super) struct Request {
    pub(super) submission: Submission,
    pub(super) seed: u64,
    // Dropped in this order: all is free again before the client hears of an error.
    pub(super) lease: Option<TurnLease>,
    pub(super) open: OpenRequest,
    pub(super) reply: Reply,
}

pub(super) struct ReadyRequest {
    pub(super) request: Request,
    pub(super) prepared: Prepared,
}

impl Request {
    /// Ends it with an error.
    pub(super) fn fail(self, error: Error) {
        let Self {
            lease,
            open,
            mut reply,
            ..
        } = self;
        // All is free again before the client hears of the error.
        drop(lease);
        drop(open);
        reply.fail(error);
    }

    /// Ends it before it began, as its client wishes.
    pub(super) fn abort(self) {
        let Self {
            submission,
            lease,
            open,
            mut reply,
            ..
        } = self;
        drop(lease);
        drop(open);
        for choice in 0..submission.n as usize {
            reply.finish(
                choice,
                Delta::default(),
                FinishReason::Abort,
                Usage::default(),
            );
        }
    }
}

#[derive(Debug, Default)]
struct Inbox {
    commands: Vec<Command>,
    /// The engine's thread is gone and nobody will look again.
    closed: bool,
}

/// What the callers, the preparing pool and the engine's thread share.
#[derive(Debug)]
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    pub(super) wake: Arc<Wake>,
    pub(super) sessions: Arc<Mutex<SessionStore>>,
    pub(super) log_counters: Arc<LogCounters>,
    open: Mutex<OpenRequests>,
    /// Most sequences that may be open.
    pub(super) max_open: usize,
    pub(super) closed: Condvar,
    accounts: Mutex<Accounts>,
    latencies: Mutex<Latencies>,
    started: Instant,
    /// Refuses new requests.
    draining: AtomicBool,
    /// Gives up what is not ready yet.
    stopping: AtomicBool,
    pub(super) health: Health,
    pub(super) stats: Mutex<Stats>,
    next_id: AtomicU64,
}

impl Command {
    /// Fails the request that the command brings.
    pub(super) fn reject(self, error: &Error) {
        match self {
            Self::Run(ready) => ready.request.fail(error.clone()),
            Self::Embed(job) => job.fail(error.clone()),
            Self::Abort(_) | Self::Stop => {}
        }
    }
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Run(_) => "Run",
            Self::Embed(_) => "Embed",
            Self::Abort(_) => "Abort",
            Self::Stop => "Stop",
        })
    }
}

pub(super) fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds since 1970 by a clock that never goes back: the system's clock when this is first asked, and the time since then.
/// A clock that is set back or forward must neither age a session nor keep it young.
pub(super) fn now_ms() -> u64 {
    static START: LazyLock<(Instant, u64)> = LazyLock::new(|| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        (
            Instant::now(),
            since.map_or(0, |since| since.as_millis() as u64),
        )
    });
    START.1 + START.0.elapsed().as_millis() as u64
}

impl Shared {
    pub(super) fn new(
        sessions: SessionStore,
        max_open: usize,
        accounts: Accounts,
        stall: Duration,
    ) -> Result<Self> {
        Ok(Self {
            inbox: Mutex::default(),
            arrived: Condvar::new(),
            wake: Arc::new(Wake::new()?),
            sessions: Arc::new(Mutex::new(sessions)),
            log_counters: Arc::default(),
            open: Mutex::default(),
            max_open,
            closed: Condvar::new(),
            accounts: Mutex::new(accounts),
            latencies: Mutex::default(),
            started: Instant::now(),
            draining: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            health: Health::new(stall),
            stats: Mutex::default(),
            next_id: AtomicU64::new(1),
        })
    }

    /// Takes a request of `choices` sequences in.
    ///
    /// # Errors
    /// 429 `queue_full` or `rate_limit_exceeded`, 503 `draining` or `engine_unavailable`.
    pub(super) fn open(self: &Arc<Self>, tenant: u32, choices: usize) -> Result<OpenRequest> {
        self.health.check_up()?;
        if self.draining.load(Ordering::Acquire) {
            let message = "the server is shutting down and takes no new requests";
            return Err(
                Error::new(Kind::Unavailable, "draining", message).with_detail("retry_after", 5)
            );
        }
        OpenRequest::new(self, tenant, choices)
    }

    pub(super) fn requests(&self) -> MutexGuard<'_, OpenRequests> {
        guard(&self.open)
    }

    pub(super) fn accounts(&self) -> MutexGuard<'_, Accounts> {
        guard(&self.accounts)
    }

    pub(super) fn latencies(&self) -> MutexGuard<'_, Latencies> {
        guard(&self.latencies)
    }

    /// Milliseconds since the engine's start, by a clock that never goes back.
    pub(super) fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Refuses new requests and waits up to `grace` for those that are open.
    pub(super) fn drain(&self, grace: Duration) {
        self.draining.store(true, Ordering::Release);
        let deadline = Instant::now() + grace;
        let mut open = guard(&self.open);
        while open.choices > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            open = self
                .closed
                .wait_timeout(open, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Gives up the requests that are being prepared.
    pub(super) fn stop_preparing(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Whether to go on with a request that is being prepared.
    ///
    /// # Errors
    /// `engine_unavailable` (503) once the engine stops; `request_aborted` (503), which nobody reads, once it is aborted.
    pub(super) fn wanted(&self, open: &OpenRequest) -> Result<()> {
        if self.stopping.load(Ordering::Acquire) {
            return Err(engine_down("it was stopped"));
        }
        if open.aborted().is_some() {
            let message = "the request was aborted";
            return Err(Error::new(Kind::Unavailable, "request_aborted", message));
        }
        Ok(())
    }

    /// Waits until a request has ended, its session's turn before it.
    pub(super) fn wait_for(&self, request: u64) {
        let mut open = guard(&self.open);
        while open.flags.contains_key(&request) {
            open = self
                .closed
                .wait(open)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A number that no request has.
    pub(super) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn open_requests(&self) -> usize {
        guard(&self.open).flags.len()
    }

    /// Hands a command to the engine's thread; where that is gone, the command's request fails.
    pub(super) fn send(&self, command: Command) {
        let mut inbox = guard(&self.inbox);
        if inbox.closed {
            drop(inbox);
            command.reject(&engine_down("it was stopped"));
            self.wake.signal();
            return;
        }
        inbox.commands.push(command);
        self.arrived.notify_one();
    }

    /// Takes all commands; waits for one if `idle`.
    pub(super) fn receive(&self, idle: bool) -> Vec<Command> {
        let mut inbox = guard(&self.inbox);
        while idle && inbox.commands.is_empty() {
            self.health.idle();
            inbox = self
                .arrived
                .wait(inbox)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.health.begin_round();
        std::mem::take(&mut inbox.commands)
    }

    /// Closes the inbox and takes what is left in it.
    pub(super) fn close(&self) -> Vec<Command> {
        let mut inbox = guard(&self.inbox);
        inbox.closed = true;
        std::mem::take(&mut inbox.commands)
    }
}

/// Tells the engine's thread to end a request before its time; false if it has ended.
pub(super) fn abort(shared: &Shared, request: u64, how: Abort) -> bool {
    let Some(flag) = shared.requests().flags.get(&request).cloned() else {
        return false;
    };
    guard(&flag).get_or_insert(how);
    shared.send(Command::Abort(request));
    true
}
