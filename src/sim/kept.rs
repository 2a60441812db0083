//! What clients keep on a server beside sessions. It outlives the server.

use crate::session::SessionKey;

/// A conversation as it is written down.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    /// All that was said, in tokens.
    pub(super) said: Vec<u32>,
    /// The session that has these tokens, unless that is gone.
    pub(super) tip: Option<SessionKey>,
    /// The response that runs, and its session.
    pub(super) running: Option<(u64, SessionKey)>,
}

/// A line of a batch.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) prompt: Vec<u32>,
    pub(super) max_tokens: usize,
    /// Its request, which is gone if the server dies.
    pub(super) running: Option<u64>,
    pub(super) asked: bool,
    /// Prompt and answer, as they are written down.
    pub(super) answer: Option<Vec<u32>>,
}

/// One batch after another.
#[derive(Debug, Default)]
pub(super) struct Batch(pub(super) Vec<Line>);

impl Batch {
    pub(super) fn has_ended(&self) -> bool {
        self.0.iter().all(|line| line.answer.is_some())
    }
}
