//! The thread that writes finished turns to a store that several servers share, before anybody hears of their end. What is waiting
//! is written at once.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::clock::now_ms;
use super::locks::lock;
use super::log_writer::{Done, LogCounters, LogSender, WriteJob};
use super::turn_guard::PreparedTurn;
use crate::error::Result;
use crate::panics::contain;
use crate::request::SessionId;
use crate::session::{LogFault, SessionKey, StoredRecord, session_overtaken};
use crate::wire::Wake;

/// Time until a store that failed is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// A turn that is to be written, and whom to tell.
type Job = (PreparedTurn, Done);

/// What became of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// The store has it.
    Kept,
    /// The store wants the whole session instead of a difference.
    Whole,
    /// Another server has changed the session meanwhile, and so the change is void.
    Overtaken,
    /// The store failed, for this reason.
    Failed(String),
}

/// A store of sessions that several servers share.
pub trait SharedStore: Send {
    /// Writes changes of sessions, each of them as a whole or not at all; None: the session has ended. Says what became of each.
    fn write(&mut self, changes: &[(&SessionKey, Option<StoredRecord>)]) -> Vec<Written>;
    /// Tries whether a store that failed is well again.
    ///
    /// # Errors
    /// Why it is not.
    fn probe(&mut self) -> Result<(), String>;
}

pub(super) struct StoreWriter {
    store: Box<dyn SharedStore>,
    wake: Arc<Wake>,
    receiver: Receiver<WriteJob>,
    counters: Arc<LogCounters>,
    fault: Option<LogFault>,
    tried: Instant,
}

impl StoreWriter {
    pub(super) fn new(
        store: Box<dyn SharedStore>,
        wake: Arc<Wake>,
        counters: Arc<LogCounters>,
    ) -> (Self, LogSender) {
        let (sender, receiver) = channel();
        let writer = Self {
            store,
            wake,
            receiver,
            counters,
            fault: None,
            tried: Instant::now(),
        };
        (writer, LogSender::new(sender))
    }

    /// Runs until every sender is gone and all is written.
    pub(super) fn run(mut self) {
        loop {
            let first = match self.next() {
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let jobs: Vec<WriteJob> = first.into_iter().chain(self.receiver.try_iter()).collect();
            // A turn whose writing panics is told that it failed, for its job is dropped.
            let done = contain("the session store", || {
                if jobs.is_empty() {
                    let fault = self.store.probe().err().map(LogFault::of_store);
                    self.publish(fault);
                } else {
                    self.write(jobs);
                }
            });
            if done.is_err() {
                self.publish(Some(LogFault::of_store("a write to it did not finish")));
            }
            self.wake.signal();
        }
    }

    /// Waits for a job, and no longer than until a store that failed is to be tried again.
    fn next(&self) -> Result<WriteJob, RecvTimeoutError> {
        if self.fault.is_some() {
            let left = TRY_AGAIN.saturating_sub(self.tried.elapsed());
            return self.receiver.recv_timeout(left);
        }
        let closed = |_| RecvTimeoutError::Disconnected;
        self.receiver.recv().map_err(closed)
    }

    fn write(&mut self, jobs: Vec<WriteJob>) {
        let now_ms = now_ms();
        let mut turns = Vec::with_capacity(jobs.len());
        for WriteJob { turn, done } in jobs {
            match turn.prepare(now_ms) {
                // The server's own sessions are of no use to another server: no client can name them.
                Some(turn) if matches!(turn.key().id, SessionId::Number(..0)) => {
                    turn.settle();
                    done.tell(Ok(()));
                }
                Some(turn) => turns.push((turn, done)),
                None => done.tell(Ok(())),
            }
        }
        let again = self.write_all(turns, false);
        self.write_all(again, true);
    }

    /// Writes turns, and tells of all but those that must be written whole, which it returns: none if `whole`.
    fn write_all(&mut self, turns: Vec<Job>, whole: bool) -> Vec<Job> {
        let mut again = Vec::new();
        if turns.is_empty() {
            return again;
        }
        let changes: Vec<_> = turns
            .iter()
            .map(|(turn, _)| (turn.key(), turn.outcome().record(whole)))
            .collect();
        let mut written = self.store.write(&changes).into_iter();
        drop(changes);
        let mut fault = None;
        for (turn, done) in turns {
            match written.next() {
                Some(Written::Kept) => {
                    turn.settle();
                    done.tell(Ok(()));
                }
                Some(Written::Whole) if whole => {
                    self.fail(turn, done, "it does not take a whole session");
                }
                Some(Written::Whole) => again.push((turn, done)),
                Some(Written::Overtaken) => {
                    let error = session_overtaken(turn.key());
                    drop(turn);
                    done.tell(Err(error));
                }
                Some(Written::Failed(why)) => {
                    fault = Some(LogFault::of_store(why.clone()));
                    // Whoever hears of a failure finds its reason.
                    self.publish(fault.clone());
                    self.fail(turn, done, &why);
                }
                None => self.fail(turn, done, "it did not say what became of the turn"),
            }
        }
        self.publish(fault);
        self.wake.signal();
        again
    }

    fn fail(&self, turn: PreparedTurn, done: Done, why: &str) {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        // The session is free again before its client hears of the error.
        drop(turn);
        done.tell(Err(LogFault::of_store(why).error()));
    }

    /// Says how the store is.
    fn publish(&mut self, fault: Option<LogFault>) {
        self.tried = Instant::now();
        if fault.is_some() != self.fault.is_some() {
            self.wake.signal();
        }
        self.fault.clone_from(&fault);
        *lock(&self.counters.fault) = fault;
    }
}

#[cfg(test)]
mod tests;
