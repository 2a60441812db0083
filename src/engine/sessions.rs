//! The engine's operations on sessions. Only [`Engine::cancel_and_end_session`] waits for the model.

use std::sync::MutexGuard;

use super::clock::now_ms;
use super::config::Limits;
use super::encode::check_vocabulary;
use super::events::Abort;
use super::handle::Engine;
use super::locks::lock;
use super::log_writer::settle;
use super::turn_guard::{FinishedTurn, TurnGuard};
use crate::error::{Error, Kind, Result};
use crate::kv::Owner;
use crate::request::SessionId;
use crate::session::{
    Commit, SessionInfo, SessionKey, SessionState, SessionStore, Start, TurnHistory, session_busy,
    stored_session,
};

/// Maximum number of turns that are cancelled one after another before the session counts as busy.
const MOST_CANCELS: usize = 8;

/// One turn of a session as text, with special tokens written out.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct TranscriptTurn {
    pub input: String,
    pub output: String,
    pub input_ids: Vec<u32>,
    pub output_ids: Vec<u32>,
}

impl Engine {
    /// The sessions that live now.
    fn sessions(&self) -> MutexGuard<'_, SessionStore> {
        let mut sessions = lock(&self.shared.sessions);
        sessions.expire(now_ms());
        sessions
    }

    /// Ends a session's running turn and keeps the tokens generated so far. Returns false if no turn runs.
    pub fn cancel_session(&self, key: &SessionKey) -> bool {
        let running = lock(&self.shared.sessions).running_request(key);
        running.is_some_and(|request| self.shared.abort(request, Abort::Cancel))
    }

    /// Drops a session. Returns false if it does not exist.
    ///
    /// # Errors
    /// `session_busy` (409) while a turn runs.
    pub fn end_session(&self, key: &SessionKey) -> Result<bool> {
        let request = self.shared.admissions.next_id();
        match TurnGuard::begin_end(&self.shared.sessions, key.clone(), request, now_ms())? {
            None => Ok(false),
            Some(end) => settle(self.log().as_ref(), end).map(|()| true),
        }
    }

    /// Cancels a session's running turn, waits for its end, and drops the session. Returns false if it does not exist.
    ///
    /// # Errors
    /// `session_busy` (409) if other clients begin one turn after another.
    pub fn cancel_and_end_session(&self, key: &SessionKey) -> Result<bool> {
        for _ in 0..MOST_CANCELS {
            let running = lock(&self.shared.sessions).running_request(key);
            let Some(request) = running else { break };
            self.shared.abort(request, Abort::Cancel);
            self.shared.admissions.wait_for(request);
        }
        self.end_session(key)
    }

    /// Creates the session `new_id` with the first `turns` turns of `key` (absent: all). It shares their cached blocks, and takes
    /// no KV block before its first turn. A running turn of `key` is not part of it.
    ///
    /// # Errors
    /// 404 as for [`Self::session_info`]; `session_exists` (409) if `new_id` exists; `session_busy` (409) while the first turn of
    /// `key` runs; `invalid_value` (400) if the session has fewer turns.
    pub fn fork_session(
        &self,
        key: &SessionKey,
        new_id: SessionId,
        turns: Option<usize>,
    ) -> Result<()> {
        let state = self.committed_state(key)?;
        let fork = SessionKey::new(key.tenant, new_id);
        let commit = state.base().after_turns(turns)?;
        self.change_session(&fork, Start::New, |_| Ok(commit))
    }

    /// Removes all but the first `turns` turns of a session.
    ///
    /// # Errors
    /// 404 as for [`Self::session_info`]; `session_busy` (409) while a turn runs; `invalid_value` (400) if the session has fewer
    /// turns.
    pub fn rewind_session(&self, key: &SessionKey, turns: usize) -> Result<()> {
        self.change_session(key, Start::Mend, |base| base.after_turns(Some(turns)))
    }

    /// Changes a session without a turn, as one transaction.
    fn change_session(
        &self,
        key: &SessionKey,
        start: Start,
        change: impl FnOnce(TurnHistory) -> Result<Commit>,
    ) -> Result<()> {
        let request = self.shared.admissions.next_id();
        let (lease, base) =
            TurnGuard::begin(&self.shared.sessions, key.clone(), request, start, now_ms())?;
        let commit = change(base)?;
        settle(self.log().as_ref(), FinishedTurn { lease, commit })
    }

    /// Holds an idle session and its KV for this long: they are evicted only after those that nobody holds. 0 ends the hold.
    ///
    /// # Errors
    /// 404 as for [`Self::session_info`].
    pub fn hold_session(&self, key: &SessionKey, hold_ms: u64) -> Result<()> {
        let now_ms = now_ms();
        let until = if hold_ms == 0 { 0 } else { now_ms + hold_ms };
        let state = {
            let mut sessions = self.sessions();
            sessions.hold(key, until)?;
            sessions.state(key)?.clone()
        };
        self.pool.set_time(now_ms);
        if let Some(owner) = self.owner(key, &state) {
            self.pool.hold(owner, &state.tokens, hold_ms);
        }
        Ok(())
    }

    /// Frees the KV that only this session uses. Returns how many of its tokens are still cached.
    ///
    /// # Errors
    /// 404 as for [`Self::session_info`].
    pub fn give_up_session(&self, key: &SessionKey) -> Result<usize> {
        let state = self.session_state(key)?;
        let Some(owner) = self.owner(key, &state) else {
            return Ok(0);
        };
        self.pool.give_up(owner, &state.tokens);
        Ok(self.pool.cached_prefix(owner, &state.tokens))
    }

    /// Creates the session `key` from the exported state of another server's session.
    ///
    /// # Errors
    /// `session_exists` (409) if it exists; 400 for tokens outside the vocabulary, or more than the context.
    pub fn import_session(&self, key: &SessionKey, commit: Commit) -> Result<()> {
        self.check_fits(&commit)?;
        self.change_session(key, Start::New, |_| Ok(commit))
    }

    /// # Errors
    /// 400 for tokens that the model does not have, or more than its context.
    fn check_fits(&self, commit: &Commit) -> Result<()> {
        let Limits {
            context_length,
            vocab_size,
            ..
        } = self.limits;
        check_vocabulary("tokens", commit.tokens.iter().copied(), vocab_size)?;
        if commit.tokens.len() >= context_length {
            let message = format!(
                "the context holds {context_length} tokens including the next one, but the session has {}",
                commit.tokens.len()
            );
            return Err(
                Error::new(Kind::Invalid, "context_length_exceeded", message).with_param("tokens"),
            );
        }
        Ok(())
    }

    /// Makes `key` a session that stands where a store of several servers has it, whatever it was before.
    ///
    /// # Errors
    /// `session_busy` (409) while a turn runs; `session_damaged` (409) for records that make no session; 400 as for
    /// [`Self::import_session`].
    pub fn restore_session(&self, key: &SessionKey, records: Vec<Vec<u8>>) -> Result<()> {
        let count = records.len();
        let Some(commit) = stored_session(records) else {
            let message = format!(
                "the session store has no whole session {}: its {count} records cannot be read",
                key.id
            );
            return Err(
                Error::new(Kind::Conflict, "session_damaged", message).with_param("instance_id")
            );
        };
        self.check_fits(&commit)?;
        self.change_session(key, Start::Fresh, |_| Ok(commit))
    }

    /// Facts about a session, without its tokens.
    ///
    /// # Errors
    /// `session_not_found` or `session_expired` (404).
    pub fn session_info(&self, key: &SessionKey) -> Result<SessionInfo> {
        self.sessions().info(key)
    }

    /// Number of a session's tokens whose KV is cached now.
    ///
    /// # Errors
    /// As for [`Self::session_info`].
    pub fn session_cached_tokens(&self, key: &SessionKey) -> Result<usize> {
        let state = self.session_state(key)?;
        let owner = self.owner(key, &state);
        Ok(owner.map_or(0, |owner| self.pool.cached_prefix(owner, &state.tokens)))
    }

    /// The owner of the cached blocks that a session computed. None: its adapter is not loaded.
    fn owner(&self, key: &SessionKey, state: &SessionState) -> Option<Owner> {
        self.shared.adapters.owner(key.tenant, state.adapter)
    }

    /// At most `limit` sessions of a tenant after the id `after`, in the order of their ids.
    pub fn list_sessions(
        &self,
        tenant: u32,
        after: Option<SessionId>,
        limit: usize,
    ) -> Vec<SessionInfo> {
        self.sessions().list(tenant, after, limit)
    }

    /// A session as of its last committed turn.
    ///
    /// # Errors
    /// As for [`Self::session_info`].
    pub fn session_state(&self, key: &SessionKey) -> Result<SessionState> {
        self.sessions().state(key).cloned()
    }

    /// A session as of its last committed turn.
    ///
    /// # Errors
    /// As for [`Self::session_info`]; `session_busy` (409) while its first turn runs.
    pub fn committed_state(&self, key: &SessionKey) -> Result<SessionState> {
        let state = self.session_state(key)?;
        if state.turns.is_empty() {
            return Err(session_busy(key));
        }
        Ok(state)
    }

    /// A session's committed turns as text.
    ///
    /// # Errors
    /// As for [`Self::session_info`].
    pub fn session_transcript(&self, key: &SessionKey) -> Result<Vec<TranscriptTurn>> {
        let state = self.session_state(key)?;
        let decode = |ids: &[u32]| {
            let tokenizer = self.model.tokenizer.as_ref();
            tokenizer.map_or_else(String::new, |tokenizer| tokenizer.decode(ids, false))
        };
        let turns = state.turns.iter().map(|turn| {
            let (input, output) = state.tokens[turn.start..turn.end()].split_at(turn.input_tokens);
            TranscriptTurn {
                input: decode(input),
                output: decode(output),
                input_ids: input.to_vec(),
                output_ids: output.to_vec(),
            }
        });
        Ok(turns.collect())
    }
}
