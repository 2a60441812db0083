//! The thread that writes finished turns to the session log before their replies end, so that the engine's thread never waits for a
//! disk. It writes all waiting turns at once, with one fsync.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::clock::now_ms;
use super::health::engine_down;
use super::locks::lock;
use super::log_file::LogFile;
use super::turn_guard::FinishedTurn;
use crate::error::{Error, Result};
use crate::panics::contain;
use crate::session::{
    Change, LogFault, LogOptions, LogStorage, Restored, SessionLog, SessionStore, StoreLimits,
};
use crate::wire::Wake;

/// Time between two fsyncs of [`Fsync::Interval`].
const SYNC_INTERVAL: Duration = Duration::from_secs(1);
/// Time until a failed rewrite is tried again.
const REWRITE_AGAIN: Duration = Duration::from_secs(60);
/// Time until a failed disk is tried again.
const HEAL_AGAIN: Duration = Duration::from_secs(1);
/// Sessions copied at a time while a log is rewritten.
const REWRITE_CHUNK: usize = 256;

/// When a written turn is safe from a crash of the machine. It is always safe from a crash of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fsync {
    /// Before a turn's reply ends.
    Always,
    /// Once a second.
    Interval,
    /// When the system does it.
    Never,
}

/// Where and how sessions are stored.
#[derive(Debug, Clone)]
pub struct DurableSessions {
    /// The log's folder, which no two servers share.
    pub folder: PathBuf,
    /// When turns are synced.
    pub fsync: Fsync,
    /// Which model its tokens belong to, and the tenants.
    pub options: LogOptions,
}

impl DurableSessions {
    /// Opens the log and reads the sessions it has.
    ///
    /// # Errors
    /// Those of [`LogFile::open`] and [`SessionLog::open`].
    pub fn open(self, limits: StoreLimits) -> Result<OpenLog> {
        let file = LogFile::open(&self.folder)?;
        let (log, sessions, restored) = SessionLog::open(file, self.options, limits, now_ms())?;
        Ok(OpenLog {
            log,
            fsync: self.fsync,
            sessions,
            restored,
        })
    }
}

/// An open log, and its sessions.
pub struct OpenLog {
    pub(super) log: SessionLog<LogFile>,
    pub(super) fsync: Fsync,
    pub(super) sessions: SessionStore,
    restored: Restored,
}

impl OpenLog {
    /// What was read from it.
    pub const fn restored(&self) -> &Restored {
        &self.restored
    }

    /// What was read from it. This closes the log.
    pub fn into_restored(self) -> Restored {
        self.restored
    }
}

/// Called once a turn is written and committed, or has failed and its session is unchanged. Dropping it reports a failure, so it is
/// always called.
pub(super) struct Done(Option<Box<dyn FnOnce(Result<()>) + Send>>);

impl Done {
    pub(super) fn new(tell: impl FnOnce(Result<()>) + Send + 'static) -> Self {
        Self(Some(Box::new(tell)))
    }

    pub(super) fn tell(mut self, outcome: Result<()>) {
        if let Some(tell) = self.0.take() {
            tell(outcome);
        }
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(tell) = self.0.take() {
            tell(Err(engine_down(
                "the thread that writes the session log has ended",
            )));
        }
    }
}

/// A finished turn on its way to the log.
pub(super) struct WriteJob {
    // Fields are dropped in this order: the session is free again before its client gets the error.
    pub(super) turn: FinishedTurn,
    pub(super) done: Done,
}

/// Sends turns to the writer's thread.
#[derive(Debug, Clone)]
pub(super) struct LogSender(Sender<WriteJob>);

impl LogSender {
    pub(super) const fn new(sender: Sender<WriteJob>) -> Self {
        Self(sender)
    }

    /// Passes a turn to the writer, which calls `done` once the turn is written.
    pub(super) fn send(&self, turn: FinishedTurn, done: Done) {
        // If the thread has ended, the job comes back. Dropping it reports the failure.
        drop(self.0.send(WriteJob { turn, done }));
    }

    /// Writes a turn and waits for it.
    pub(super) fn write(&self, turn: FinishedTurn) -> Result<()> {
        let (told, outcome) = channel();
        // The receiver lives until this is called.
        self.send(turn, Done::new(move |result| drop(told.send(result))));
        outcome
            .recv()
            .unwrap_or_else(|_| Err(engine_down("it was stopped")))
    }
}

/// Counters of the writer, for other threads to read.
#[derive(Debug, Default)]
pub(super) struct LogCounters {
    pub(super) bytes: AtomicU64,
    pub(super) failures: AtomicU64,
    pub(super) rewrites: AtomicU64,
    /// Why nothing can be written now.
    pub(super) fault: Mutex<Option<LogFault>>,
}

impl LogCounters {
    /// Why nothing can be written now; absent if the log works.
    pub(super) fn fault(&self) -> Option<LogFault> {
        lock(&self.fault).clone()
    }
}

pub(super) struct LogWriter<S> {
    log: SessionLog<S>,
    sessions: Arc<Mutex<SessionStore>>,
    wake: Arc<Wake>,
    fsync: Fsync,
    receiver: Receiver<WriteJob>,
    counters: Arc<LogCounters>,
    synced: Instant,
    rewrite_not_before: Instant,
    heal_not_before: Instant,
    heal_again: Duration,
}

impl<S: LogStorage> LogWriter<S> {
    pub(super) fn new(
        log: SessionLog<S>,
        sessions: Arc<Mutex<SessionStore>>,
        wake: Arc<Wake>,
        fsync: Fsync,
        counters: Arc<LogCounters>,
    ) -> (Self, LogSender) {
        let (sender, receiver) = channel();
        let now = Instant::now();
        let writer = Self {
            log,
            sessions,
            wake,
            fsync,
            receiver,
            counters,
            synced: now,
            rewrite_not_before: now,
            heal_not_before: now,
            heal_again: HEAL_AGAIN,
        };
        (writer, LogSender(sender))
    }

    /// Runs until every sender is gone and all is written.
    pub(super) fn run(mut self) {
        loop {
            let first = match self.next() {
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let jobs: Vec<WriteJob> = first.into_iter().chain(self.receiver.try_iter()).collect();
            // If the write panics, its jobs are dropped, and this reports the failure to each.
            let done = contain("the session log", || {
                if !jobs.is_empty() {
                    self.write(jobs);
                }
                self.sync_in_time();
                self.heal();
                self.rewrite();
            });
            self.count(done.map_err(drop));
            self.wake.signal();
            self.publish();
        }
        // Sessions that were evicted since the last turn.
        self.write(Vec::new());
        let synced = self.log.sync();
        self.count(synced.map_err(drop));
        self.publish();
    }

    /// Publishes the log's counters and fault.
    fn publish(&self) {
        self.counters.bytes.store(self.log.len(), Ordering::Relaxed);
        let fault = self.log.fault().cloned();
        let before = std::mem::replace(&mut *lock(&self.counters.fault), fault.clone());
        if before.is_some() != fault.is_some() {
            self.wake.signal();
        }
    }

    /// Waits for a job, at most until the next fsync, retry or rewrite is due.
    fn next(&self) -> Result<WriteJob, RecvTimeoutError> {
        if self.log.is_rewriting() {
            return self.receiver.try_recv().map_err(|e| match e {
                TryRecvError::Empty => RecvTimeoutError::Timeout,
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            });
        }
        if self.log.fault().is_some() {
            let left = self
                .heal_not_before
                .saturating_duration_since(Instant::now());
            return self.receiver.recv_timeout(left);
        }
        if self.fsync == Fsync::Interval && self.log.is_unsynced() {
            let left = SYNC_INTERVAL.saturating_sub(self.synced.elapsed());
            return self.receiver.recv_timeout(left);
        }
        let closed = |_| RecvTimeoutError::Disconnected;
        self.receiver.recv().map_err(closed)
    }

    fn write(&mut self, jobs: Vec<WriteJob>) {
        let evicted = lock(&self.sessions).evicted();
        let now_ms = now_ms();
        let mut turns = Vec::with_capacity(jobs.len());
        for WriteJob { turn, done } in jobs {
            match turn.prepare(now_ms) {
                Some(turn) => turns.push((turn, done)),
                None => done.tell(Ok(())),
            }
        }
        let evictions = evicted.iter().map(Change::Evict);
        let changes: Vec<_> = evictions
            .clone()
            .chain(turns.iter().map(|(turn, _)| turn.change()))
            .collect();
        let together = self.append_or_heal(&changes);
        // If a group cannot be written, each turn is tried alone, so that one does not fail the others. Evictions come first.
        let evictions_written = match &together {
            Err(_) if !evicted.is_empty() && changes.len() > evicted.len() => {
                self.append(&evictions.collect::<Vec<_>>())
            }
            _ => together.clone(),
        };
        if evictions_written.is_ok() {
            lock(&self.sessions).evictions_written(evicted.len());
        }
        let alone = evictions_written.is_ok() || evicted.is_empty();
        let retry = together.is_err() && alone && changes.len() > 1;
        drop(changes);
        // Whoever gets the failure can then read its reason.
        self.publish();
        for (turn, done) in turns {
            let written = if retry {
                self.append(&[turn.change()])
            } else {
                together.clone()
            };
            if written.is_ok() {
                turn.settle();
            } else {
                drop(turn);
            }
            done.tell(written);
        }
        self.wake.signal();
    }

    /// Appends changes. If the disk has lost the log, writes the whole log again first.
    fn append_or_heal(&mut self, changes: &[Change<'_>]) -> Result<()> {
        let written = self.append(changes);
        if written.is_err() && self.log.is_suspect() && self.heal() {
            return self.append(changes);
        }
        written
    }

    fn append(&mut self, changes: &[Change<'_>]) -> Result<()> {
        let written = self.log.append(changes, self.fsync == Fsync::Always);
        self.count(written.as_ref().map_err(drop).copied());
        written
    }

    fn sync_in_time(&mut self) {
        if self.fsync == Fsync::Interval && self.synced.elapsed() >= SYNC_INTERVAL {
            let synced = self.log.sync();
            self.count(synced.map_err(drop));
            self.synced = Instant::now();
        }
    }

    /// Tries whether a failed disk works again. Returns true if it does.
    fn heal(&mut self) -> bool {
        if self.log.fault().is_none() || Instant::now() < self.heal_not_before {
            return self.log.fault().is_none();
        }
        let healed = if self.log.is_suspect() {
            let sessions = &self.sessions;
            let next = |last, limit| lock(sessions).states_after(last, limit);
            let rewritten = self.log.rewrite_all(next, || lock(sessions).tombstones());
            rewritten.map_err(drop)
        } else {
            self.log.probe().map_err(drop)
        };
        self.heal_not_before = Instant::now() + self.heal_again;
        self.count(healed);
        healed.is_ok()
    }

    /// Begins a rewrite if one is due, or continues it.
    fn rewrite(&mut self) {
        let due = Instant::now() >= self.rewrite_not_before;
        let outcome = if self.log.is_rewriting() {
            let sessions = &self.sessions;
            let copied = self.log.rewrite_some(
                |last| lock(sessions).states_after(last, REWRITE_CHUNK),
                || lock(sessions).tombstones(),
            );
            if copied.is_ok() && !self.log.is_rewriting() {
                self.counters.rewrites.fetch_add(1, Ordering::Relaxed);
            }
            copied
        } else if due
            && self.log.fault().is_none()
            && self.log.wants_rewrite(lock(&self.sessions).log_bytes())
        {
            self.log.begin_rewrite()
        } else {
            return;
        };
        if outcome.is_err() {
            self.rewrite_not_before = Instant::now() + REWRITE_AGAIN;
        }
        self.count(outcome.map_err(drop));
    }

    fn count(&self, outcome: Result<(), ()>) {
        if outcome.is_err() {
            self.counters.failures.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Commits a turn. Without a log nothing is written.
pub(super) fn settle(log: Option<&LogSender>, turn: FinishedTurn) -> Result<(), Error> {
    if let Some(log) = log {
        return log.write(turn);
    }
    turn.commit(now_ms());
    Ok(())
}

#[cfg(test)]
mod tests;
