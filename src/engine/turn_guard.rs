//! A session's running turn. Dropping the guard leaves the session at its last committed turn.

use std::sync::{Arc, Mutex};

use super::locks::lock;
use crate::error::{Kind, Result};
use crate::request::SessionRef;
use crate::session::{
    Change, Commit, Outcome, SessionKey, SessionStore, Start, TurnHistory, session_busy,
    session_damaged,
};

/// Owns one running turn, and ends it.
#[derive(Debug)]
pub struct TurnGuard {
    store: Arc<Mutex<SessionStore>>,
    key: SessionKey,
    request: u64,
    open: bool,
}

impl TurnGuard {
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
    ) -> Result<(Self, TurnHistory)> {
        let base = lock(store).begin(&key, request, start, now_ms)?;
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
    /// Those of [`SessionStore::begin`]; for a branch, 404 if its parent does not exist, and `session_busy` (409) while the
    /// parent's first turn runs.
    pub fn begin_turn(
        store: &Arc<Mutex<SessionStore>>,
        key: SessionKey,
        session: &SessionRef,
        request: u64,
        now_ms: u64,
    ) -> Result<(Self, TurnHistory)> {
        let Some(parent) = &session.parent else {
            let start = Start::of(session.start, session.create);
            return Self::begin(store, key, request, start, now_ms);
        };
        let parent = SessionKey::new(key.tenant, parent.clone());
        let state = {
            let mut store = lock(store);
            store.expire(now_ms);
            store.state(&parent)?.clone()
        };
        if state.turns.is_empty() {
            return Err(session_busy(&parent));
        }
        if state.lost_turn > 0 {
            return Err(session_damaged(&parent, &state));
        }
        let (lease, _) = Self::begin(store, key, request, Start::New, now_ms)?;
        // Two branches of one session get different random numbers.
        let base = TurnHistory {
            seed: None,
            ..state.base()
        };
        Ok((lease, base))
    }

    /// Attaches the turn's outcome.
    pub const fn finish(self, commit: Commit) -> FinishedTurn {
        FinishedTurn {
            lease: self,
            commit,
        }
    }

    /// Begins to end a session, as a turn that leaves nothing behind. None if the session does not exist.
    ///
    /// # Errors
    /// `session_busy` (409).
    pub fn begin_end(
        store: &Arc<Mutex<SessionStore>>,
        key: SessionKey,
        request: u64,
        now_ms: u64,
    ) -> Result<Option<FinishedTurn>> {
        match Self::begin(store, key, request, Start::Mend, now_ms) {
            Ok((lease, _)) => {
                let commit = Commit::end();
                Ok(Some(FinishedTurn { lease, commit }))
            }
            Err(error) if error.kind == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A turn with its outcome, before it becomes the session's state. Dropping it leaves the session unchanged.
#[derive(Debug)]
pub struct FinishedTurn {
    pub(super) lease: TurnGuard,
    pub(super) commit: Commit,
}

impl FinishedTurn {
    /// Makes the outcome the session's state.
    pub fn commit(self, now_ms: u64) {
        let Self { mut lease, commit } = self;
        lease.open = false;
        lock(&lease.store).commit(&lease.key, lease.request, commit, now_ms);
    }

    /// Prepares [`Self::commit`], so that the outcome can be written to the log first.
    pub fn prepare(self, now_ms: u64) -> Option<PreparedTurn> {
        let Self { lease, commit } = self;
        let outcome = lock(&lease.store).outcome(&lease.key, lease.request, commit, now_ms)?;
        Some(PreparedTurn { lease, outcome })
    }
}

/// A turn whose outcome can be written to the log. Dropping it leaves the session unchanged.
#[derive(Debug)]
pub struct PreparedTurn {
    lease: TurnGuard,
    outcome: Outcome,
}

impl PreparedTurn {
    /// What to write to the log.
    pub const fn change(&self) -> Change<'_> {
        Change::Settle(&self.lease.key, &self.outcome)
    }

    /// The session.
    pub(super) const fn key(&self) -> &SessionKey {
        &self.lease.key
    }

    /// What becomes of it.
    pub(super) const fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// Makes the outcome the session's state, after it was written.
    pub fn settle(self) {
        let Self { mut lease, outcome } = self;
        lease.open = false;
        lock(&lease.store).settle(&lease.key, lease.request, outcome);
    }
}

impl Drop for TurnGuard {
    fn drop(&mut self) {
        if self.open {
            lock(&self.store).rollback(&self.key, self.request);
        }
    }
}
