//! The sessions of one server. A pure state machine: time is passed in, and nothing depends on map order.
//!
//! A session holds the token ids of its committed turns; its KV is ordinary evictable memory of the prefix cache. A turn is
//! a transaction: [`SessionStore::begin`] marks the session busy and hands out its history, and exactly one of
//! [`SessionStore::commit`] and [`SessionStore::rollback`] ends it.

use std::collections::{BTreeSet, HashMap, VecDeque};

use crate::error::{Error, Kind, Result};
pub use crate::text::Tail;

/// Evicted ids that are remembered, to tell `session_expired` from `session_not_found`.
const MAX_TOMBSTONES: usize = 65_536;

/// A session id within its tenant: two API keys may use the same id without meeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey {
    /// The API key's number; 0 is no key.
    pub tenant: u32,
    /// The client's id.
    pub id: i64,
}

/// One committed turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Token offset in the session at which the turn begins (0 for the first).
    pub start: usize,
    /// Tokens the turn brought in.
    pub input_tokens: usize,
    /// Tokens it generated and kept.
    pub output_tokens: usize,
}

/// How many sessions are kept, and how long.
#[derive(Debug, Clone, Copy)]
pub struct StoreLimits {
    /// Most sessions of the server; the least recently used idle one goes first.
    pub max_sessions: usize,
    /// Milliseconds an idle session is kept; 0: for ever.
    pub ttl_ms: u64,
}

impl Default for StoreLimits {
    fn default() -> Self {
        Self {
            max_sessions: 100_000,
            ttl_ms: 0,
        }
    }
}

#[derive(Debug, Clone)]
struct Running {
    request: u64,
    fresh: bool,
}

#[derive(Debug, Clone)]
struct Session {
    tokens: Vec<u32>,
    turns: Vec<Turn>,
    tail: Tail,
    seed: u64,
    /// Leading tokens that are the system prompt, where the template can tell them apart.
    system_tokens: usize,
    running: Option<Running>,
    created_ms: u64,
    used_ms: u64,
}

/// What a turn builds on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
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
}

/// What a finished turn leaves behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// All tokens of the session after the turn.
    pub tokens: Vec<u32>,
    /// All turns after the turn.
    pub turns: Vec<Turn>,
    /// Whether the last assistant message is still open.
    pub tail: Tail,
    /// Seed of the session's sampling.
    pub seed: u64,
    /// Leading tokens that are the system prompt.
    pub system_tokens: usize,
    /// Drop the session with this turn.
    pub end: bool,
}

/// What can be said of a session without its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionInfo {
    /// Whose it is.
    pub key: SessionKey,
    /// Committed turns.
    pub turns: usize,
    /// Committed tokens.
    pub tokens: usize,
    /// Whether a turn runs.
    pub busy: bool,
    /// When the session began, in milliseconds of the caller's clock.
    pub created_ms: u64,
    /// When it was last used.
    pub used_ms: u64,
}

/// All sessions of one server.
#[derive(Debug, Default)]
pub struct SessionStore {
    sessions: HashMap<SessionKey, Session>,
    /// Idle sessions by time of last use.
    idle: BTreeSet<(u64, SessionKey)>,
    limits: StoreLimits,
    tombstones: HashMap<SessionKey, u64>,
    tombstone_order: VecDeque<(u64, SessionKey)>,
    next_tombstone: u64,
}

fn missing(key: SessionKey, expired: bool) -> Error {
    let (code, why) = if expired {
        ("session_expired", "was evicted")
    } else {
        ("session_not_found", "does not exist")
    };
    let message = format!(
        "session {} {why}; start it with sequence_start=true",
        key.id
    );
    Error::new(Kind::NotFound, code, message).with_param("instance_id")
}

fn busy(key: SessionKey) -> Error {
    let message = format!(
        "session {} already runs a turn; one turn runs at a time",
        key.id
    );
    Error::new(Kind::Conflict, "session_busy", message)
        .with_param("instance_id")
        .with_detail("retry_after", 1)
}

impl SessionStore {
    /// An empty store.
    pub fn new(limits: StoreLimits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    /// Live sessions.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether no session lives.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Marks the session busy with `request` and hands out what its turn builds on.
    ///
    /// `fresh` starts a new sequence (a live one is replaced when the turn commits, not before); otherwise the session must
    /// live, unless `create` is set.
    ///
    /// # Errors
    /// `session_busy` (409) while another turn runs; `session_not_found` or `session_expired` (404).
    pub fn begin(
        &mut self,
        key: SessionKey,
        request: u64,
        fresh: bool,
        create: bool,
        now_ms: u64,
    ) -> Result<Base> {
        self.expire(now_ms);
        let Some(session) = self.sessions.get_mut(&key) else {
            if !fresh && !create {
                return Err(missing(key, self.tombstones.contains_key(&key)));
            }
            let session = Session {
                tokens: Vec::new(),
                turns: Vec::new(),
                tail: Tail::Closed,
                seed: 0,
                system_tokens: 0,
                running: Some(Running {
                    request,
                    fresh: true,
                }),
                created_ms: now_ms,
                used_ms: now_ms,
            };
            self.sessions.insert(key, session);
            self.evict_over_cap();
            return Ok(Base::empty());
        };
        if session.running.is_some() {
            return Err(busy(key));
        }
        self.idle.remove(&(session.used_ms, key));
        session.running = Some(Running { request, fresh });
        if fresh {
            return Ok(Base::empty());
        }
        Ok(Base {
            history: session.tokens.clone(),
            tail: session.tail,
            seed: Some(session.seed),
            turns: session.turns.clone(),
            system_tokens: session.system_tokens,
        })
    }

    /// Ends the running turn of `request` and makes its outcome the session's state. A turn that no longer runs is ignored.
    pub fn commit(&mut self, key: SessionKey, request: u64, commit: Commit, now_ms: u64) {
        let Some(session) = self.running_mut(key, request) else {
            return;
        };
        let fresh = session.running.take().is_some_and(|running| running.fresh);
        if commit.end {
            self.sessions.remove(&key);
            return;
        }
        session.tokens = commit.tokens;
        session.turns = commit.turns;
        session.tail = commit.tail;
        session.seed = commit.seed;
        session.system_tokens = commit.system_tokens;
        session.used_ms = now_ms;
        if fresh {
            session.created_ms = now_ms;
        }
        self.idle.insert((now_ms, key));
        self.tombstones.remove(&key);
        self.evict_over_cap();
    }

    /// Ends the running turn of `request` and leaves the session at its last committed turn.
    pub fn rollback(&mut self, key: SessionKey, request: u64) {
        let Some(session) = self.running_mut(key, request) else {
            return;
        };
        session.running = None;
        let (empty, used_ms) = (session.turns.is_empty(), session.used_ms);
        if empty {
            self.sessions.remove(&key);
        } else {
            self.idle.insert((used_ms, key));
        }
        self.evict_over_cap();
    }

    fn running_mut(&mut self, key: SessionKey, request: u64) -> Option<&mut Session> {
        self.sessions
            .get_mut(&key)
            .filter(|s| s.running.as_ref().is_some_and(|r| r.request == request))
    }

    /// Drops a session; false if there was none.
    ///
    /// # Errors
    /// `session_busy` (409) while a turn runs.
    pub fn remove(&mut self, key: SessionKey) -> Result<bool> {
        let Some(session) = self.sessions.get(&key) else {
            return Ok(false);
        };
        if session.running.is_some() {
            return Err(busy(key));
        }
        self.idle.remove(&(session.used_ms, key));
        self.sessions.remove(&key);
        Ok(true)
    }

    /// The request whose turn runs in the session, if one does.
    pub fn running_request(&self, key: SessionKey) -> Option<u64> {
        self.sessions
            .get(&key)?
            .running
            .as_ref()
            .map(|running| running.request)
    }

    /// What can be said of a session.
    ///
    /// # Errors
    /// `session_not_found` or `session_expired` (404).
    pub fn info(&self, key: SessionKey) -> Result<SessionInfo> {
        let session = self
            .sessions
            .get(&key)
            .ok_or_else(|| missing(key, self.tombstones.contains_key(&key)))?;
        Ok(session.info(key))
    }

    /// Committed token ids of a session.
    ///
    /// # Errors
    /// `session_not_found` or `session_expired` (404).
    pub fn tokens(&self, key: SessionKey) -> Result<&[u32]> {
        self.sessions
            .get(&key)
            .map(|session| session.tokens.as_slice())
            .ok_or_else(|| missing(key, self.tombstones.contains_key(&key)))
    }

    /// Drops idle sessions older than the time to live.
    pub fn expire(&mut self, now_ms: u64) {
        if self.limits.ttl_ms == 0 {
            return;
        }
        while let Some(&(used_ms, key)) = self.idle.first() {
            if used_ms.saturating_add(self.limits.ttl_ms) > now_ms {
                break;
            }
            self.evict(used_ms, key);
        }
    }

    fn evict_over_cap(&mut self) {
        while self.sessions.len() > self.limits.max_sessions {
            let Some(&(used_ms, key)) = self.idle.first() else {
                break;
            };
            self.evict(used_ms, key);
        }
    }

    fn evict(&mut self, used_ms: u64, key: SessionKey) {
        self.idle.remove(&(used_ms, key));
        self.sessions.remove(&key);
        let stamp = self.next_tombstone;
        self.next_tombstone += 1;
        self.tombstones.insert(key, stamp);
        self.tombstone_order.push_back((stamp, key));
        while self.tombstone_order.len() > MAX_TOMBSTONES {
            if let Some((stamp, key)) = self.tombstone_order.pop_front()
                && self.tombstones.get(&key) == Some(&stamp)
            {
                self.tombstones.remove(&key);
            }
        }
    }
}

impl Base {
    /// What a first turn builds on: nothing.
    pub const fn empty() -> Self {
        Self {
            history: Vec::new(),
            tail: Tail::Closed,
            seed: None,
            turns: Vec::new(),
            system_tokens: 0,
        }
    }
}

impl Session {
    fn info(&self, key: SessionKey) -> SessionInfo {
        SessionInfo {
            key,
            turns: self.turns.len(),
            tokens: self.tokens.len(),
            busy: self.running.is_some(),
            created_ms: self.created_ms,
            used_ms: self.used_ms,
        }
    }
}
