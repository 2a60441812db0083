//! A session's running turn, owned: dropping the lease leaves the session at its last committed turn.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::session::{Base, Commit, SessionKey, SessionStore, Start};

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
