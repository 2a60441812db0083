//! What a session is between two turns.

use std::sync::Arc;

use super::ledger::{Logprobs, SessionUsage};
use crate::error::{Error, Result};
use crate::request::SessionId;
use crate::text::Tail;

/// About the bytes of a session's record in a log without its turns and tokens, and of a turn.
const PUT_BYTES: usize = 161;
const TURN_BYTES: usize = 9;

/// A session id within its tenant: two API keys may use the same id without meeting.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey {
    /// The API key's number; 0 is no key.
    pub tenant: u32,
    /// The id within the tenant.
    pub id: SessionId,
}

impl SessionKey {
    /// The key of a tenant's session.
    pub fn new(tenant: u32, id: impl Into<SessionId>) -> Self {
        Self {
            tenant,
            id: id.into(),
        }
    }
}

/// Why a session is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// Its client ended it.
    Ended,
    /// It made room for others, or was unused for too long.
    Evicted,
    /// All records of it were damaged.
    Lost,
}

impl Gone {
    pub(super) const fn byte(self) -> u8 {
        match self {
            Self::Ended => 0,
            Self::Evicted => 1,
            Self::Lost => 2,
        }
    }

    pub(super) const fn parse(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0] => Some(Self::Ended),
            [1] => Some(Self::Evicted),
            [2] => Some(Self::Lost),
            _ => None,
        }
    }
}

/// One committed turn. Turns follow one another without a gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Token offset in the session at which the turn begins (0 for the first).
    pub start: usize,
    /// Tokens the turn brought in.
    pub input_tokens: usize,
    /// Tokens it generated and kept.
    pub output_tokens: usize,
    /// Whether it left the assistant's message open.
    pub tail: Tail,
    /// Of its output tokens, where they were asked for.
    pub logprobs: Option<Logprobs>,
}

impl Turn {
    /// Token offset in the session at which the turn ends.
    pub const fn end(&self) -> usize {
        self.start + self.input_tokens + self.output_tokens
    }
}

/// A session at its last committed turn. Cheap to clone: clones share their tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionState {
    /// Token ids of all turns.
    pub tokens: Arc<[u32]>,
    /// The turns; none while the first one runs.
    pub turns: Arc<[Turn]>,
    /// Seed of the session's sampling, which is a function of it and the position: all of the generator's state.
    pub seed: u64,
    /// Leading tokens that are the system prompt, where the template can tell them apart.
    pub system_tokens: usize,
    /// When the session began, in milliseconds of the caller's clock.
    pub created_ms: u64,
    /// When it was last used.
    pub used_ms: u64,
    /// A number that grows with every use of any session. Clocks can be set back; this tells which of two was used last.
    pub used_order: u64,
    /// Turns behind the last one here and up to this one were in a log and are lost; 0: none is. What comes next would follow
    /// something that nobody knows, so the session takes no turn until it is taken back to one that it has.
    pub lost_turn: u32,
    /// What its turns have used, those that it was taken back behind included.
    pub usage: SessionUsage,
}

/// What a turn builds on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnHistory {
    /// Token ids of the committed turns; empty for a first turn.
    pub history: Vec<u32>,
    /// Whether the last assistant message is still open.
    pub tail: Tail,
    /// Seed of the session's sampling, absent before the first turn.
    pub seed: Option<u64>,
    /// The committed turns.
    pub turns: Vec<Turn>,
    /// Leading tokens that are the system prompt.
    pub system_tokens: usize,
    /// Committed turns of the live session that the turn replaces with a new one.
    pub replaced_turns: usize,
}

/// What a finished turn leaves behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// All tokens of the session after the turn.
    pub tokens: Vec<u32>,
    /// All turns after the turn.
    pub turns: Vec<Turn>,
    /// Seed of the session's sampling.
    pub seed: u64,
    /// Leading tokens that are the system prompt.
    pub system_tokens: usize,
    /// Drop the session with this turn.
    pub end: bool,
    /// What the turn has used.
    pub usage: SessionUsage,
    /// Keep the session for so long from now on, where others can make room.
    pub hold_ms: Option<u64>,
}

/// What a transaction makes of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The session at its last committed turn; absent where it had none.
    pub before: Option<SessionState>,
    /// The session now; absent where it is dropped.
    pub after: Option<SessionState>,
}

impl Commit {
    /// A session of these turns: input tokens, output tokens, whether the assistant's message is open, and what is known of the
    /// output's log-probabilities.
    ///
    /// # Errors
    /// `invalid_value` (400) where turns and tokens are not those of a session.
    pub fn of_turns(
        tokens: Vec<u32>,
        parts: Vec<(usize, usize, Tail, Option<Logprobs>)>,
        seed: u64,
        system_tokens: usize,
    ) -> Result<Self> {
        let mut turns: Vec<Turn> = Vec::with_capacity(parts.len());
        for (at, (input_tokens, output_tokens, tail, logprobs)) in parts.into_iter().enumerate() {
            let scored = logprobs.as_ref().map_or(output_tokens, Logprobs::len);
            let start = turns.last().map_or(0, Turn::end);
            let end = start
                .checked_add(input_tokens)
                .and_then(|end| end.checked_add(output_tokens));
            if end.is_none_or(|end| end == start || end > tokens.len()) || scored != output_tokens {
                let message = format!(
                    "turns[{at}] has {input_tokens} input tokens, {output_tokens} output tokens and {scored} \
                     log-probabilities, but the session has {} tokens behind the turns before",
                    tokens.len() - start
                );
                return Err(Error::invalid("turns", message));
            }
            turns.push(Turn {
                start,
                input_tokens,
                output_tokens,
                tail,
                logprobs,
            });
        }
        let end = turns.last().map_or(0, Turn::end);
        if turns.is_empty() || end != tokens.len() || system_tokens > end {
            let message = format!(
                "the turns have {end} tokens and the system prompt {system_tokens}, but the session has {}",
                tokens.len()
            );
            return Err(Error::invalid("turns", message));
        }
        Ok(Self {
            tokens,
            turns,
            seed,
            system_tokens,
            ..Self::end()
        }
        .kept())
    }

    const fn kept(mut self) -> Self {
        self.end = false;
        self
    }

    /// The end of a session.
    pub fn end() -> Self {
        Self {
            tokens: Vec::new(),
            turns: Vec::new(),
            seed: 0,
            system_tokens: 0,
            end: true,
            usage: SessionUsage::default(),
            hold_ms: None,
        }
    }
}

impl TurnHistory {
    /// What a first turn builds on: nothing.
    pub const fn empty() -> Self {
        Self {
            history: Vec::new(),
            tail: Tail::Closed,
            seed: None,
            turns: Vec::new(),
            system_tokens: 0,
            replaced_turns: 0,
        }
    }

    /// The session as it stood after its first `turns` turns; all of them if absent.
    ///
    /// # Errors
    /// `invalid_value` (400) where there are not so many, or none is asked for.
    pub fn after_turns(mut self, turns: Option<usize>) -> Result<Commit> {
        let limit = self.turns.len();
        let count = turns.unwrap_or(limit);
        if count == 0 || count > limit {
            let message = format!("turns must lie in [1, {limit}], but {count} was given");
            return Err(Error::invalid("turns", message));
        }
        self.turns.truncate(count);
        self.history.truncate(self.turns[count - 1].end());
        Ok(Commit {
            tokens: self.history,
            turns: self.turns,
            seed: self.seed.unwrap_or(0),
            system_tokens: self.system_tokens,
            end: false,
            usage: SessionUsage::default(),
            hold_ms: None,
        })
    }
}

impl SessionState {
    /// Bytes that the state takes in a log.
    pub(super) fn log_bytes(&self) -> u64 {
        {
            let logprobs = self.turns.iter().filter_map(|turn| turn.logprobs.as_ref());
            let scored: usize = logprobs.map(Logprobs::len).sum();
            let turns = TURN_BYTES * self.turns.len();
            (PUT_BYTES + turns + 4 * (self.tokens.len() + scored)) as u64
        }
    }

    pub(super) fn new(now_ms: u64) -> Self {
        Self {
            tokens: Arc::new([]),
            turns: Arc::new([]),
            seed: 0,
            system_tokens: 0,
            created_ms: now_ms,
            used_ms: now_ms,
            used_order: 0,
            lost_turn: 0,
            usage: SessionUsage::default(),
        }
    }

    /// What a turn of the session builds on.
    pub fn base(&self) -> TurnHistory {
        TurnHistory {
            history: self.tokens.to_vec(),
            tail: self.turns.last().map_or(Tail::Closed, |turn| turn.tail),
            seed: Some(self.seed),
            turns: self.turns.to_vec(),
            system_tokens: self.system_tokens,
            replaced_turns: 0,
        }
    }
}
