//! The session of a turn, and what becomes of it.

use serde::Deserialize;

use super::SessionId;

/// The session a turn belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a member of its JSON"
)]
#[serde(deny_unknown_fields)]
pub struct SessionRef {
    /// The client's id, unique within its tenant.
    pub id: SessionId,
    /// First turn: drop a live session with this id and begin a new one.
    #[serde(default)]
    pub start: bool,
    /// The client has not set `start`: if it drops a live session, the reply has a warning (/generate).
    #[serde(default)]
    pub by_default: bool,
    /// Create the session if it does not exist; otherwise continue it (chat completions).
    #[serde(default)]
    pub create: bool,
    /// The session of which this one begins as a fork, with a new seed.
    #[serde(default)]
    pub parent: Option<SessionId>,
    /// Run this turn, then drop the session.
    #[serde(default)]
    pub end: bool,
    /// What to do with the session's KV cache after the turn. Absent: it is evicted in LRU order.
    #[serde(default)]
    pub retention: Option<Retention>,
    /// What to do with the turn if the client disconnects.
    #[serde(default)]
    pub on_disconnect: OnDisconnect,
}

/// What to do with a turn whose client disconnects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDisconnect {
    /// The session stays at its last committed turn.
    #[default]
    Rollback,
    /// The turn is committed with the tokens generated so far.
    Keep,
}

/// What to do with a session's KV cache after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Retention {
    /// For this time, it and the session are evicted only after those that nobody holds.
    Hold {
        /// Milliseconds.
        ms: u64,
    },
    /// It is freed at once; the session's tokens are kept.
    GiveUp,
}
