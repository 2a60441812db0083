//! What happens to a server's disk, and its death.

use std::sync::{Arc, Mutex};

use super::check::{Check, ensure};
use super::journal::Journal;
use super::ledger::Ledger;
use super::reader::Replies;
use super::world::World;
use crate::kv::StatePool;
use crate::session::{Lanes, SessionStore};

impl World {
    /// The disk fills up, fails or panics for a moment; the log is synced, rewritten a little, or mended.
    pub(super) fn disturb_log(&mut self) {
        let Some(journal) = &mut self.journal else {
            return;
        };
        let random = &mut self.random;
        let mut disk = journal.file.disk();
        if random.once_in(300) {
            disk.full_after = Some(random.range(0, 60));
        }
        if random.once_in(400) {
            disk.panics_after = Some(random.range(0, 150));
        }
        if random.once_in(300) {
            disk.failing_syncs = random.range(1, 3);
        }
        drop(disk);
        if random.once_in(4) && journal.rewrite(&self.store) {
            self.counters.rewrites += 1;
        }
        if random.once_in(6) {
            journal.sync();
        }
        if journal.log.fault().is_some() && random.once_in(self.config.patience) {
            self.counters.mended_logs += u64::from(journal.mend(&self.store));
        }
    }

    /// A disk that is well makes a log well.
    pub(super) fn mend_log(&mut self) -> Check {
        let Some(journal) = &mut self.journal else {
            return Ok(());
        };
        journal.file.disk().calm();
        let well = journal.log.fault().is_none() || journal.mend(&self.store);
        ensure(well, || "a log stays broken on a disk that is well".into())
    }

    /// The process ends at once: requests and KV are gone, and so are sessions that no log has. A new one starts.
    pub(super) fn kill(&mut self) -> Check {
        self.faults.kills += 1;
        self.note_life();
        self.check_sessions()?;
        let pool = Arc::clone(self.core.scheduler().pool());
        let (core, model, tiers) =
            Self::boot(&self.config, &self.tokenizer, &self.drive, &mut self.random)?;
        self.core = core;
        self.model = model;
        self.tiers = tiers;
        self.preparing.clear();
        self.lanes = Arc::new(Mutex::new(Lanes::new(self.config.lanes)));
        ensure(pool.counts().owned == 0, || {
            "a dead core owns blocks".into()
        })?;
        let limits = self.config.sessions;
        if let Some(journal) = self.journal.take() {
            let remains = journal.die(&mut self.random, &self.ledger.sessions)?;
            if let Some(key) = &remains.known.damaged {
                let lives = remains.known.sessions.contains_key(key);
                self.counters.read_only += u64::from(lives);
                self.counters.lost += u64::from(!lives);
            }
            self.ledger = Ledger::restored(limits, remains.known.clone(), self.now_ms);
            let (journal, store) = Journal::reopen(remains, limits, self.now_ms, &self.ledger)?;
            self.store = Arc::new(Mutex::new(store));
            self.journal = Some(journal);
        } else {
            self.store = Arc::new(Mutex::new(SessionStore::new(limits)));
            self.ledger = Ledger::new(limits);
        }
        self.counters.restored += self.ledger.sessions.len() as u64;
        self.check_sessions()
            .map_err(|what| format!("after a restart, {what}"))?;
        self.replies = Replies::new(self.config.reading, self.replies.digest)?;
        Ok(())
    }

    /// Adds what the core and the disk have counted since they started.
    pub(super) fn note_life(&mut self) {
        let stats = self.core.scheduler().stats();
        self.counters.preemptions += stats.preemptions;
        self.counters.recomputed_tokens += stats.recomputed_tokens;
        self.counters.drafted_tokens += stats.drafted_tokens;
        self.counters.accepted_tokens += stats.accepted_tokens;
        self.counters.mtp_accepted_tokens += stats.mtp_accepted_tokens;
        self.counters.cached_tokens += stats.cached_tokens;
        let book = &mut self.ledger.book;
        self.counters.lane_turns += std::mem::take(&mut book.kept);
        self.counters.lane_responses += std::mem::take(&mut book.kept_responses);
        let pool = self.core.scheduler().pool();
        self.counters.evictions += pool.evictions();
        self.counters.window_evictions += pool.window_counts().evictions;
        let states = pool.states().map(StatePool::stats).unwrap_or_default();
        self.counters.snapshots += states.taken;
        self.counters.snapshot_hits += states.hits;
        self.counters.snapshot_evictions += states.evictions;
        if let Some(journal) = &mut self.journal {
            self.faults += std::mem::take(&mut journal.file.disk().faults);
            self.counters.unwritten_turns += std::mem::take(&mut journal.unwritten);
        }
    }
}
