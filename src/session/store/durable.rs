//! What a log needs of the store: its states in order, its evictions, and the way back.

use std::ops::Bound;

use super::super::state::{SessionKey, SessionState};
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

    /// Takes the keys that were evicted since the last call.
    pub fn take_evicted(&mut self) -> Vec<SessionKey> {
        self.evicted
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// The evictions that are remembered, the latest ones last.
    pub fn tombstones(&self) -> Vec<SessionKey> {
        self.tombstones.all()
    }

    /// At most `limit` sessions at their last committed turn in order of their keys, those behind `after`.
    pub fn states_after(
        &self,
        after: Option<SessionKey>,
        limit: usize,
    ) -> Vec<(SessionKey, SessionState)> {
        let first = after.map_or(Bound::Unbounded, Bound::Excluded);
        let sessions = self.sessions.range((first, Bound::Unbounded));
        let committed = sessions.filter(|(_, session)| !session.state.turns.is_empty());
        let states = committed.map(|(&key, session)| (key, session.state.clone()));
        states.take(limit).collect()
    }

    /// From now on evictions are noted for a log.
    pub(in crate::session) fn note_evictions(&mut self) {
        self.evicted = Some(Vec::new());
    }

    /// Takes a session in as a log has it. It may be one too many: [`Self::enforce`] follows.
    pub(in crate::session) fn restore(&mut self, key: SessionKey, state: SessionState) {
        let session = Session {
            state,
            used_order: 0,
            running: None,
        };
        self.idle.insert(session.used(), key);
        self.insert(key, session);
    }

    /// Remembers an eviction as a log has it.
    pub(in crate::session) fn restore_evicted(&mut self, key: SessionKey) {
        self.tombstones.insert(key);
    }

    /// Evicts what is too old or too much.
    pub(in crate::session) fn enforce(&mut self, now_ms: u64) {
        self.expire(now_ms);
        self.evict_over_cap(0);
    }
}
