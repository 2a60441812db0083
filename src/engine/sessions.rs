//! The engine's verbs on sessions. They return at once, whatever the model does.

use super::core::Abort;
use super::handle::Engine;
use super::lease::lock;
use super::shared::abort;
use crate::error::Result;
use crate::session::{SessionInfo, SessionKey};

impl Engine {
    /// Ends the running turn of a session with what it has; false if none runs.
    pub fn cancel_session(&self, key: SessionKey) -> bool {
        let running = lock(&self.shared.sessions).running_request(key);
        running.is_some_and(|request| abort(&self.shared, request, Abort::Cancel))
    }

    /// Drops a session; false if there was none.
    ///
    /// # Errors
    /// `session_busy` (409) while a turn runs.
    pub fn end_session(&self, key: SessionKey) -> Result<bool> {
        lock(&self.shared.sessions).remove(key)
    }

    /// What can be said of a session.
    ///
    /// # Errors
    /// `session_not_found` or `session_expired` (404).
    pub fn session_info(&self, key: SessionKey) -> Result<SessionInfo> {
        lock(&self.shared.sessions).info(key)
    }

    /// Committed token ids of a session.
    ///
    /// # Errors
    /// `session_not_found` or `session_expired` (404).
    pub fn session_tokens(&self, key: SessionKey) -> Result<Vec<u32>> {
        lock(&self.shared.sessions).tokens(key).map(<[u32]>::to_vec)
    }
}
