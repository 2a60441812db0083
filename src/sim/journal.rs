//! A session log over a disk that outlives its server, with a record of all that was written to it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::check::ensure;
use super::disk::MemoryFile;
use super::frames::frames;
use super::ledger::Ledger;
use super::random::Random;
use super::records::Session;
use super::records::{Entry, Known, Records, add, bring_back, check_restored};
use crate::engine::FinishedTurn;
use crate::error::{Error, Result};
use crate::panics::contain;
use crate::session::{
    Change, LogFault, LogOptions, SessionKey, SessionLog, SessionState, SessionStore, StoreLimits,
};

/// Bytes of out-of-date records that are worth a rewrite: few, so that it happens often.
const MIN_GARBAGE: u64 = 2048;
/// Sessions that are copied at a time.
const CHUNK: usize = 2;

/// A log over a disk that outlives its server.
#[derive(Debug)]
pub(super) struct Journal {
    pub(super) file: MemoryFile,
    pub(super) log: SessionLog<MemoryFile>,
    records: Records,
    /// Of the file that a rewrite makes, and the last session that it has copied.
    next: Records,
    copied: Option<SessionKey>,
    /// Of the file that was replaced, while it may come back, and what was promised of that.
    old: Option<(Records, usize)>,
    /// Bytes of the log that were said to be safe from a loss of power.
    promised: usize,
    /// Turns that could not be written.
    pub(super) unwritten: u64,
    /// A turn was refused, and nothing was wrong.
    pub(super) unfair: Option<String>,
}

fn lock(store: &Mutex<SessionStore>) -> MutexGuard<'_, SessionStore> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Journal {
    /// Begins a log, and the store that it fills.
    pub(super) fn begin(
        limits: StoreLimits,
        now_ms: u64,
    ) -> std::result::Result<(Self, SessionStore), String> {
        let remains = Remains::default();
        Self::reopen(remains, limits, now_ms, &Ledger::new(limits))
    }

    /// Opens a log again; `ledger`: what it must bring back.
    pub(super) fn reopen(
        remains: Remains,
        limits: StoreLimits,
        now_ms: u64,
        ledger: &Ledger,
    ) -> std::result::Result<(Self, SessionStore), String> {
        let Remains {
            file,
            known,
            records,
            replaced,
        } = remains;
        let mut options = LogOptions::new([7; 32], "toy");
        options.tenants = (0..2).map(|n| (n, [n as u8; 32])).collect();
        options.min_garbage = MIN_GARBAGE;
        options.marker = *b"\x05marker!";
        let opened = SessionLog::open(file.clone(), options, limits, now_ms);
        let (log, store, restored) = opened.map_err(|error| error.message)?;
        check_restored(&restored, known.damaged.as_ref())?;
        let records = if file.disk().replaced == replaced {
            records
        } else {
            ledger.committed().records()
        };
        let journal = Self {
            file,
            promised: log.len() as usize,
            log,
            records,
            next: Records::new(),
            copied: None,
            old: None,
            unwritten: 0,
            unfair: None,
        };
        Ok((journal, store))
    }

    fn write_evictions(&mut self, store: &Mutex<SessionStore>) -> Result<()> {
        let evicted = lock(store).evicted();
        for key in evicted {
            self.log.append(&[Change::Evict(&key)], false)?;
            lock(store).evictions_written(1);
            self.note(&key, Entry::Gone);
        }
        Ok(())
    }

    /// A record was written.
    fn note(&mut self, key: &SessionKey, entry: Entry) {
        if self.copied.as_ref().is_some_and(|last| key <= last) {
            add(&mut self.next, key, entry.clone());
        }
        add(&mut self.records, key, entry);
    }

    /// Writes a turn down and settles it. Where that goes wrong, the session stays as it was.
    pub(super) fn write(
        &mut self,
        store: &Mutex<SessionStore>,
        turn: FinishedTurn,
        now_ms: u64,
    ) -> Result<()> {
        let fault = self.log.fault().filter(|_| self.log.is_suspect());
        let (refused, before) = (fault.map(LogFault::code), self.file.disk().faults);
        let append = || self.append(store, turn, now_ms);
        let written = contain("the session log", append).flatten();
        if let Err(error) = &written {
            self.unwritten += 1;
            let after = self.file.disk().faults;
            let expected = if after.log_panics > before.log_panics {
                Some("internal_error")
            } else if after.full_disks > before.full_disks {
                Some("storage_full")
            } else {
                refused.or_else(|| (after != before).then_some("storage_failed"))
            };
            if expected != Some(error.code) {
                self.unfair = Some(format!(
                    "a turn is refused with {error:?}, not {expected:?}"
                ));
            }
        }
        written
    }

    fn append(
        &mut self,
        store: &Mutex<SessionStore>,
        turn: FinishedTurn,
        now_ms: u64,
    ) -> Result<()> {
        self.write_evictions(store)?;
        let turn = turn.prepare(now_ms);
        let turn = turn.ok_or_else(|| Error::internal("a turn finished that does not run"))?;
        let (change, synced) = (turn.change(), now_ms.is_multiple_of(4));
        self.log.append(std::slice::from_ref(&change), synced)?;
        if synced {
            self.promised = self.log.len() as usize;
        }
        if let Change::Settle(key, outcome) = change {
            let after = outcome.after.as_ref();
            let entry = after.map_or(Entry::Ended, |after| Entry::Put(Session::of(after)));
            self.note(key, entry);
        }
        turn.settle();
        Ok(())
    }

    /// Makes all that was written safe from a loss of power, if it can.
    pub(super) fn sync(&mut self) {
        if self.log.sync().is_ok() {
            self.promised = self.log.len() as usize;
        }
    }

    /// Goes on with a rewrite, or begins one that is due; true once it is done.
    pub(super) fn rewrite(&mut self, store: &Mutex<SessionStore>) -> bool {
        let rewrite = || self.rewrite_some(store);
        contain("the session log", rewrite) == Ok(true)
    }

    fn rewrite_some(&mut self, store: &Mutex<SessionStore>) -> bool {
        if self.write_evictions(store).is_err() {
            return false;
        }
        if !self.log.is_rewriting() {
            if self.log.wants_rewrite(lock(store).log_bytes()) {
                // Where the disk is full, the log stays as it is.
                drop(self.log.begin_rewrite());
                self.begin_records();
            }
            return false;
        }
        let before = self.file.disk().replaced;
        let (next, copied) = (&mut self.next, &mut self.copied);
        let done = self.log.rewrite_some(
            |last| copy(lock(store).states_after(last, CHUNK), next, copied),
            || lock(store).tombstones(),
        );
        self.end_rewrite(store, before, done.is_ok())
    }

    /// Tries whether the log can be written again; true where it can.
    pub(super) fn mend(&mut self, store: &Mutex<SessionStore>) -> bool {
        if !self.log.is_suspect() {
            return contain("the session log", || self.log.probe())
                .flatten()
                .is_ok();
        }
        let before = self.file.disk().replaced;
        self.begin_records();
        let (next, copied) = (&mut self.next, &mut self.copied);
        let done = self.log.rewrite_all(
            |last, _| copy(lock(store).states_after(last, CHUNK), next, copied),
            || lock(store).tombstones(),
        );
        self.end_rewrite(store, before, done.is_ok())
    }

    fn begin_records(&mut self) {
        self.next.clear();
        self.copied = None;
    }

    /// Takes note of a new file in the log's place, if there is one now; its place is safe where the rewrite is `done`.
    fn end_rewrite(&mut self, store: &Mutex<SessionStore>, before: u64, done: bool) -> bool {
        if self.file.disk().replaced == before {
            return false;
        }
        let gone = lock(store).tombstones();
        for (key, _) in gone {
            add(&mut self.next, &key, Entry::Gone);
        }
        let records = std::mem::replace(&mut self.records, std::mem::take(&mut self.next));
        self.begin_records();
        self.old.get_or_insert((records, self.promised));
        if done {
            self.old = None;
        }
        self.promised = self.log.len() as usize;
        done
    }
}

/// Copies sessions to the new file.
fn copy(
    states: Vec<(SessionKey, SessionState)>,
    next: &mut Records,
    copied: &mut Option<SessionKey>,
) -> Vec<(SessionKey, SessionState)> {
    for (key, state) in &states {
        add(next, key, Entry::Put(Session::of(state)));
        *copied = Some(key.clone());
    }
    states
}

/// A disk whose server has died.
#[derive(Debug, Default)]
pub(super) struct Remains {
    pub(super) file: MemoryFile,
    pub(super) known: Known,
    records: Records,
    replaced: u64,
}

impl Journal {
    /// The server dies, and perhaps the machine with it; perhaps a bit flips before the next one begins.
    pub(super) fn die(
        mut self,
        random: &mut Random,
        sessions: &BTreeMap<SessionKey, Session>,
    ) -> std::result::Result<Remains, String> {
        let mut disk = self.file.disk();
        let mut end = self.log.len() as usize;
        let (written, _) = frames(&disk.log()[..end]);
        let known = bring_back(&self.records, &written, None)?;
        let count: usize = self.records.values().map(Vec::len).sum();
        ensure(count == written.len(), || {
            format!("{count} records were written, {} are there", written.len())
        })?;
        for (key, session) in sessions {
            let back = known.sessions.get(key);
            let kept = session.turns.is_empty() || back.is_some_and(|b| b.tokens == session.tokens);
            ensure(kept, || {
                format!("{key:?} had a turn that is not in the log")
            })?;
        }
        disk.calm();
        if random.once_in(3) {
            let (comes_back, left) = disk.lose_power(random);
            end = left.min(end);
            if comes_back && let Some(old) = self.old.take() {
                (self.records, self.promised) = old;
                end = left;
            }
            ensure(left >= self.promised, || {
                format!(
                    "{left} bytes of a log are left, {} were safe",
                    self.promised
                )
            })?;
        } else if disk.log().len() == end {
            disk.tear(random);
        }
        let (left, end) = frames(&disk.log()[..end]);
        let hit = if random.once_in(4) {
            None
        } else {
            let bit = random.range(0, 8 * end - 1);
            disk.flip(bit);
            left.iter()
                .position(|frame| frame.bytes.contains(&(bit / 8)))
        };
        let known = bring_back(&self.records, &left, hit)?;
        for (key, entries) in &mut self.records {
            entries.truncate(left.iter().filter(|frame| frame.key == *key).count());
        }
        let replaced = disk.replaced;
        drop(disk);
        Ok(Remains {
            file: self.file,
            known,
            records: self.records,
            replaced,
        })
    }
}
