//! What a log needs of the store: its states in order, its evictions, and the way back.

use std::collections::VecDeque;
use std::ops::Bound;

use super::super::state::{Gone, SessionKey, SessionState};
use super::{Session, SessionStore};

impl SessionStore {
    /// Tokens of all committed turns.
    pub const fn tokens(&self) -> usize {
        self.totals.tokens
    }

    /// Bytes that all sessions would take in a log.
    pub const fn log_bytes(&self) -> u64 {
        self.totals.log_bytes
    }

    /// The keys that were evicted and are not written down yet, the oldest first. They stay here until
    /// [`Self::evictions_written`].
    pub fn evicted(&self) -> Vec<SessionKey> {
        self.evicted.iter().flatten().cloned().collect()
    }

    /// The first `count` of the evictions are written down.
    pub fn evictions_written(&mut self, count: usize) {
        if let Some(evicted) = &mut self.evicted {
            evicted.drain(..count.min(evicted.len()));
        }
    }

    /// The sessions that are remembered as gone, the latest ones last.
    pub fn tombstones(&self) -> Vec<(SessionKey, Gone)> {
        self.tombstones.all()
    }

    /// At most `limit` sessions at their last committed turn, in order of their keys, after the key `after`.
    pub fn states_after(
        &self,
        after: Option<SessionKey>,
        limit: usize,
    ) -> Vec<(SessionKey, SessionState)> {
        let first = after.map_or(Bound::Unbounded, Bound::Excluded);
        let sessions = self.sessions.range((first, Bound::Unbounded));
        let committed = sessions.filter(|(_, session)| !session.state.turns.is_empty());
        let states = committed.map(|(key, session)| (key.clone(), session.state.clone()));
        states.take(limit).collect()
    }

    /// From now on evictions are noted for a log.
    pub(in crate::session) fn note_evictions(&mut self) {
        self.evicted = Some(VecDeque::new());
    }

    /// Takes a session in as a log has it; from a log that knows no order of uses, the least recently used first. It may be one
    /// too many: [`Self::enforce`] follows.
    pub(in crate::session) fn restore(
        &mut self,
        key: SessionKey,
        mut state: SessionState,
        now_ms: u64,
    ) {
        if state.used_order == 0 {
            state.used_order = self.uses + 1;
        }
        self.uses = self.uses.max(state.used_order);
        // A clock that was ahead must not keep a session for ever.
        state.used_ms = state.used_ms.min(now_ms);
        self.idle.insert(state.used_order, 0, &key);
        let session = Session {
            state,
            running: None,
            hold_until: 0,
        };
        self.insert(key, session);
    }

    /// Remembers a session as a log has it that is gone.
    pub(in crate::session) fn restore_gone(&mut self, key: SessionKey, gone: Gone) {
        self.tombstones.insert(key, gone);
    }

    /// Evicts what is too old or too much.
    pub(in crate::session) fn enforce(&mut self, now_ms: u64) {
        self.expire(now_ms);
        self.evict_over_cap(0);
    }
}
