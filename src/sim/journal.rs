//! What the session log must bring back: every session after each of its records, kept as simply as can be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::disk::MemoryFile;
use super::ledger::{Check, Ledger, Session, ensure};
use super::random::Random;
use crate::engine::FinishedTurn;
use crate::error::{Error, Result};
use crate::session::{
    Change, LogOptions, Restored, SessionKey, SessionLog, SessionStore, StoreLimits, Turn,
};

/// Bytes of out-of-date records that are worth a rewrite: few, so that it happens often.
const MIN_GARBAGE: u64 = 2048;

/// Sessions, and those that were evicted.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    pub(super) sessions: BTreeMap<SessionKey, Session>,
    pub(super) evicted: BTreeSet<SessionKey>,
}

/// What one record of the log did.
#[derive(Debug)]
enum Entry {
    Put(SessionKey, Session),
    End(SessionKey),
    Evicted(SessionKey),
}

/// A log over a disk that outlives its server.
#[derive(Debug)]
pub(super) struct Journal {
    pub(super) file: MemoryFile,
    pub(super) log: SessionLog<MemoryFile>,
    /// What the log said when it was opened or rewritten.
    base: Known,
    /// The records since then, each with the log's length behind it.
    entries: Vec<(u64, Entry)>,
}

fn lock(store: &Mutex<SessionStore>) -> MutexGuard<'_, SessionStore> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Journal {
    /// Opens the log of a disk, and the store that it fills.
    pub(super) fn open(
        file: MemoryFile,
        limits: StoreLimits,
        now_ms: u64,
        base: Known,
    ) -> Result<(Self, SessionStore, Restored)> {
        let mut options = LogOptions::new([7; 32], "toy");
        options.tenants = (0..2).map(|n| (n, [n as u8; 32])).collect();
        options.min_garbage = MIN_GARBAGE;
        let opened = SessionLog::open(file.clone(), options, limits, now_ms);
        let (log, store, restored) = opened?;
        let entries = Vec::new();
        let journal = Self {
            file,
            log,
            base,
            entries,
        };
        Ok((journal, store, restored))
    }

    fn write_evictions(&mut self, store: &Mutex<SessionStore>) -> Result<()> {
        // One that is not written comes back after a kill, which is allowed and hard to foretell.
        let full_after = self.file.disk().full_after.take();
        let evicted = lock(store).evicted();
        for key in evicted {
            self.log.append(&[Change::Evict(&key)], false)?;
            lock(store).evictions_written(1);
            self.entries.push((self.log.len(), Entry::Evicted(key)));
        }
        self.file.disk().full_after = full_after;
        Ok(())
    }

    /// Writes a turn down and settles it. Where the disk takes no more, the session stays as it was.
    pub(super) fn write(
        &mut self,
        store: &Mutex<SessionStore>,
        turn: FinishedTurn,
        now_ms: u64,
    ) -> Result<()> {
        self.write_evictions(store)?;
        let turn = turn.prepare(now_ms);
        let turn = turn.ok_or_else(|| Error::internal("a turn finished that does not run"))?;
        let change = turn.change();
        self.log
            .append(std::slice::from_ref(&change), now_ms.is_multiple_of(4))?;
        if let Change::Settle(key, outcome) = change {
            let entry = match &outcome.after {
                Some(after) => Entry::Put(key.clone(), Session::of(after)),
                None => Entry::End(key.clone()),
            };
            self.entries.push((self.log.len(), entry));
        }
        turn.settle();
        Ok(())
    }

    /// Goes on with a rewrite, or begins one that is due; true once it is done.
    ///
    /// # Errors
    /// What the log says of evictions that cannot be written.
    pub(super) fn rewrite(&mut self, store: &Mutex<SessionStore>, known: &Ledger) -> Result<bool> {
        self.write_evictions(store)?;
        if !self.log.is_rewriting() {
            if self.log.wants_rewrite(lock(store).log_bytes()) {
                // Where the disk is full, the log stays as it is.
                drop(self.log.begin_rewrite());
            }
            return Ok(false);
        }
        let copied = self.log.rewrite_some(
            |last| lock(store).states_after(last, 2),
            || lock(store).tombstones(),
        );
        if copied.is_err() || self.log.is_rewriting() {
            return Ok(false);
        }
        self.base = known.committed();
        self.entries.clear();
        Ok(true)
    }

    /// What a log of so many bytes must bring back.
    pub(super) fn known_at(&self, len: u64) -> Known {
        let mut known = self.base.clone();
        for (end, entry) in &self.entries {
            if *end > len {
                break;
            }
            match entry {
                Entry::Put(key, session) => {
                    known.evicted.remove(key);
                    known.sessions.insert(key.clone(), session.clone());
                }
                Entry::End(key) => {
                    known.evicted.remove(key);
                    known.sessions.remove(key);
                }
                Entry::Evicted(key) => {
                    known.sessions.remove(key);
                    known.evicted.insert(key.clone());
                }
            }
        }
        known
    }

    /// The server dies, and perhaps the machine with it. Returns the disk and what it must bring back.
    pub(super) fn die(
        self,
        random: &mut Random,
        sessions: &BTreeMap<SessionKey, Session>,
    ) -> std::result::Result<(MemoryFile, Known), String> {
        let mut len = self.log.len();
        let known = self.known_at(len);
        for (key, session) in sessions {
            let back = known.sessions.get(key);
            let kept = session.turns.is_empty() || back.is_some_and(|b| b.tokens == session.tokens);
            ensure(kept, || {
                format!("{key:?} had a turn that is not in the log")
            })?;
        }
        if random.once_in(3) {
            len = self.file.disk().lose_power(random);
        } else {
            self.file.disk().tear(random);
        }
        let known = self.known_at(len);
        Ok((self.file, known))
    }
}

/// Holds a store to what it must be.
pub(super) fn check_store(store: &SessionStore, sessions: &BTreeMap<SessionKey, Session>) -> Check {
    ensure(store.len() == sessions.len(), || {
        format!("{} sessions, not {}", store.len(), sessions.len())
    })?;
    let mut tokens = 0;
    for (key, session) in sessions {
        let state = store.state(key).map_err(|error| error.message)?;
        ensure(*state.tokens == session.tokens, || {
            format!("{key:?} has other tokens")
        })?;
        let ends = state.turns.iter().map(Turn::end);
        ensure(ends.eq(session.turns.iter().copied()), || {
            format!(
                "{key:?} has the turns {:?}, not {:?}",
                state.turns, session.turns
            )
        })?;
        tokens += session.tokens.len();
    }
    ensure(store.tokens() == tokens, || {
        format!("{} tokens, not {tokens}", store.tokens())
    })
}
