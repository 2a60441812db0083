//! The state of a session between two turns.

use std::sync::Arc;

use super::ledger::{Logprobs, SessionUsage};
use crate::error::{Error, Result};
use crate::request::{SessionId, TurnKey};
use crate::text::Tail;

/// Approximate bytes of a session's record in a log without its turns and tokens, and of a turn.
const PUT_BYTES: usize = 161;
const TURN_BYTES: usize = 9;
/// Bytes of a turn's name there.
const KEY_BYTES: usize = 9 + TurnKey::BYTES;
/// Of the name of its adapter.
const ADAPTER_BYTES: usize = 37;

/// A SHA-256 of an adapter's contents, whatever it is called.
pub type AdapterDigest = [u8; 32];

/// A session id within its tenant: two API keys may use the same id for two different sessions.
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
    /// It was dropped to make room, or was unused for too long.
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
    /// Number of input tokens of the turn.
    pub input_tokens: usize,
    /// Number of generated tokens that it kept.
    pub output_tokens: usize,
    /// Whether it left the assistant's message open.
    pub tail: Tail,
    /// Log-probabilities of its output tokens, if they were requested.
    pub logprobs: Option<Logprobs>,
    /// Its name, if it must not run twice.
    pub key: Option<TurnKey>,
}

/// A committed turn, and what it built on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnBefore {
    /// History and input.
    pub prompt: Vec<u32>,
    /// Number of leading tokens of `prompt` that are the history.
    pub history_tokens: usize,
    /// What it generated.
    pub output: Vec<u32>,
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
    /// Seed of the session's sampling. A sampled token depends only on it and the position, so it is the whole state of the generator.
    pub seed: u64,
    /// Number of leading tokens that are the system prompt, if the template can tell them apart.
    pub system_tokens: usize,
    /// When the session began, in milliseconds of the caller's clock.
    pub created_ms: u64,
    /// When it was last used.
    pub used_ms: u64,
    /// A number that grows with every use of any session. It tells which of two was used last, even if the clock was set back.
    pub used_order: u64,
    /// The last of the turns that a damaged log has lost; 0: none is lost. The next turn would follow unknown tokens, so the session takes
    /// no turn until it is rewound to a turn that it still has.
    pub lost_turn: u32,
    /// What its turns have used, including turns that a rewind has removed.
    pub usage: SessionUsage,
    /// The adapter that computed its turns; None: the model alone.
    pub adapter: Option<AdapterDigest>,
}

/// The history on which a turn builds.
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
    /// Number of leading tokens that are the system prompt.
    pub system_tokens: usize,
    /// Number of committed turns of the live session that the turn replaces with a new one.
    pub replaced_turns: usize,
    /// The adapter that computed the turns; None: the model alone.
    pub adapter: Option<AdapterDigest>,
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
    /// Number of leading tokens that are the system prompt.
    pub system_tokens: usize,
    /// The adapter that computed the turns; None: the model alone.
    pub adapter: Option<AdapterDigest>,
    /// Drop the session with this turn.
    pub end: bool,
    /// What the turn has used.
    pub usage: SessionUsage,
    /// Hold the session for this long from now on.
    pub hold_ms: Option<u64>,
    /// When the session began, if that was on another server.
    pub created_ms: Option<u64>,
}

/// What a transaction makes of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The session at its last committed turn; absent if it had none.
    pub before: Option<SessionState>,
    /// The new state of the session; absent if it is dropped.
    pub after: Option<SessionState>,
}

impl Commit {
    /// A session of these turns: number of input tokens, number of output tokens, whether the assistant's message is open, and the
    /// recorded log-probabilities of the output.
    ///
    /// # Errors
    /// `invalid_value` (400) if turns and tokens do not form a session.
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
                     log-probabilities, but the session has {} tokens after the earlier turns",
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
                key: None,
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
            adapter: None,
            end: true,
            usage: SessionUsage::default(),
            hold_ms: None,
            created_ms: None,
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
            adapter: None,
        }
    }

    /// The session after its first `turns` turns; after all of them if absent.
    ///
    /// # Errors
    /// `invalid_value` (400) if there are fewer turns, or if `turns` is 0.
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
            adapter: self.adapter,
            end: false,
            usage: SessionUsage::default(),
            hold_ms: None,
            created_ms: None,
        })
    }
}

impl SessionState {
    /// Number of bytes that the state takes in a log.
    pub(super) fn log_bytes(&self) -> u64 {
        {
            let logprobs = self.turns.iter().filter_map(|turn| turn.logprobs.as_ref());
            let scored: usize = logprobs.map(Logprobs::len).sum();
            let keys = self.turns.iter().filter(|turn| turn.key.is_some());
            let turns = TURN_BYTES * self.turns.len() + KEY_BYTES * keys.count();
            let adapter = self.adapter.map_or(0, |_| ADAPTER_BYTES);
            (PUT_BYTES + adapter + turns + 4 * (self.tokens.len() + scored)) as u64
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
            adapter: None,
        }
    }

    /// The turn of that name; None if the session has none.
    pub fn turn_before(&self, key: TurnKey) -> Option<TurnBefore> {
        let turn = self.turns.iter().find(|turn| turn.key == Some(key))?;
        let output = turn.start + turn.input_tokens;
        Some(TurnBefore {
            prompt: self.tokens[..output].to_vec(),
            history_tokens: turn.start,
            output: self.tokens[output..turn.end()].to_vec(),
        })
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
            adapter: self.adapter,
        }
    }
}
