//! A session's running turn, owned: dropping the lease leaves the session at its last committed turn.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::request::SessionRef;
use crate::session::{Base, Commit, SessionKey, SessionStore, Start, session_busy};

/// The right, and the duty, to end one turn.
#[derive(Debug)]
pub struct TurnLease {
    store: Arc<Mutex<SessionStore>>,
    key: SessionKey,
    request: u64,
    open: bool,
}

/// The store, whatever became of other threads: its methods leave it whole.
pub(super) fn lock(store: &Mutex<SessionStore>) -> MutexGuard<'_, SessionStore> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TurnLease {
    /// Begins a turn; see [`SessionStore::begin`].
    ///
    /// # Errors
    /// Those of [`SessionStore::begin`].
    pub fn begin(
        store: &Arc<Mutex<SessionStore>>,
        key: SessionKey,
        request: u64,
        start: Start,
        now_ms: u64,
    ) -> Result<(Self, Base)> {
        let base = lock(store).begin(key, request, start, now_ms)?;
        Ok((
            Self {
                store: Arc::clone(store),
                key,
                request,
                open: true,
            },
            base,
        ))
    }

    /// Begins the turn of a request in session `key`.
    ///
    /// # Errors
    /// Those of [`SessionStore::begin`]; of a branch, 404 for a parent that does not live, and `session_busy` (409) while its
    /// first turn runs.
    pub fn begin_turn(
        store: &Arc<Mutex<SessionStore>>,
        key: SessionKey,
        session: &SessionRef,
        request: u64,
        now_ms: u64,
    ) -> Result<(Self, Base)> {
        let Some(parent) = session.parent else {
            let start = Start::of(session.start, session.create);
            return Self::begin(store, key, request, start, now_ms);
        };
        let parent = SessionKey { id: parent, ..key };
        let state = {
            let mut store = lock(store);
            store.expire(now_ms);
            store.state(parent)?.clone()
        };
        if state.turns.is_empty() {
            return Err(session_busy(parent));
        }
        let (lease, _) = Self::begin(store, key, request, Start::New, now_ms)?;
        // Two branches of one session draw differently.
        let base = Base {
            seed: None,
            ..state.base()
        };
        Ok((lease, base))
    }

    /// Makes the turn's outcome the session's state.
    pub fn commit(mut self, commit: Commit, now_ms: u64) {
        self.open = false;
        lock(&self.store).commit(self.key, self.request, commit, now_ms);
    }
}

impl Drop for TurnLease {
    fn drop(&mut self) {
        if self.open {
            lock(&self.store).rollback(self.key, self.request);
        }
    }
}
