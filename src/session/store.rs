//! The sessions of one server. A pure state machine: time is passed in, and nothing depends on map order.
//!
//! A session has the token ids of its committed turns; its KV blocks are ordinary, evictable blocks of the prefix cache. A turn is
//! a transaction: [`SessionStore::begin`] marks the session busy and returns its history, and exactly one of
//! [`SessionStore::commit`] and [`SessionStore::rollback`] ends it. Every change of a session is such a transaction: a turn, a
//! rewind, a fork, and its end.

mod durable;
mod eviction;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;

use super::idle::{Idle, Tombstones};
use super::ledger::SessionUsage;
use super::state::{Commit, Gone, Outcome, SessionKey, SessionState, TurnHistory};
use crate::error::{Error, Kind, Result};
use crate::request::SessionId;

/// How many sessions are kept, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct StoreLimits {
    /// Maximum number of sessions of the server. The least recently used idle one is dropped first.
    pub max_sessions: usize,
    /// Milliseconds for which an idle session is kept. 0: for ever.
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

/// How a turn opens its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// A live session; its history comes before the turn.
    Continue,
    /// A live session, even if it is read-only: to rewind it to before the turns that it has lost, or to end it.
    Mend,
    /// A live session, or else a new one, unless it was evicted.
    Create,
    /// A new session. A live one with this id is replaced when the turn commits, not before.
    Fresh,
    /// A new session. No live session may have this id.
    New,
}

impl Start {
    /// As in a request: `start` begins anew, `create` creates the session if it does not exist.
    pub const fn of(start: bool, create: bool) -> Self {
        match (start, create) {
            (true, _) => Self::Fresh,
            (false, true) => Self::Create,
            (false, false) => Self::Continue,
        }
    }
}

#[derive(Debug, Clone)]
struct Running {
    request: u64,
    fresh: bool,
    /// Until when the session is to be held once the turn is committed.
    hold_until: u64,
}

#[derive(Debug, Clone)]
struct Session {
    state: SessionState,
    running: Option<Running>,
    /// Until then, the session is evicted only after those that nobody holds.
    hold_until: u64,
}

/// A session without its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionInfo {
    /// Whose it is.
    pub key: SessionKey,
    /// Committed turns.
    pub turns: usize,
    /// Committed tokens.
    pub tokens: usize,
    /// Whether a turn is running.
    pub busy: bool,
    /// When the session began, in milliseconds of the caller's clock.
    pub created_ms: u64,
    /// When it was last used.
    pub used_ms: u64,
    /// The last of the turns that it has lost, which makes it read-only. 0: it has lost none.
    pub lost_turn: u32,
    /// What its turns have used.
    pub usage: SessionUsage,
    /// Until when it is held, in milliseconds of the caller's clock. 0: it is not held.
    pub hold_until: u64,
}

/// All sessions of one server.
#[derive(Debug, Default)]
pub struct SessionStore {
    sessions: BTreeMap<SessionKey, Session>,
    /// Number of sessions of each tenant.
    counts: HashMap<u32, usize>,
    idle: Idle,
    /// Number of turns committed so far.
    uses: u64,
    limits: StoreLimits,
    tenant_caps: HashMap<u32, usize>,
    tombstones: Tombstones,
    /// Evictions that are not in the log yet, the oldest first. Absent without a log.
    evicted: Option<VecDeque<SessionKey>>,
    totals: Totals,
}

/// Sums over all sessions.
#[derive(Debug, Default)]
struct Totals {
    tokens: usize,
    log_bytes: u64,
}

impl Totals {
    fn add(&mut self, state: &SessionState) {
        self.tokens += state.tokens.len();
        self.log_bytes += state.log_bytes();
    }

    fn remove(&mut self, state: &SessionState) {
        self.tokens -= state.tokens.len();
        self.log_bytes -= state.log_bytes();
    }
}

/// 409: one turn of a session runs at a time.
pub fn session_busy(key: &SessionKey) -> Error {
    busy(format!(
        "session {} is already running a turn; a session runs one turn at a time",
        key.id
    ))
}

/// 409: another server has written the session since the turn began.
pub fn session_overtaken(key: &SessionKey) -> Error {
    busy(format!(
        "another server has continued session {} meanwhile; this turn is not part of it",
        key.id
    ))
}

fn busy(message: String) -> Error {
    Error::new(Kind::Conflict, "session_busy", message)
        .with_param("instance_id")
        .with_detail("retry_after", 1)
}

/// 409: turns of the session are lost, so no turn can follow them.
pub fn session_damaged(key: &SessionKey, state: &SessionState) -> Error {
    let turns = state.turns.len();
    let message = format!(
        "session {} lost the turns after turn {turns} (up to turn {}), because its log was damaged; it is \
         read-only: rewind it to at most {turns} turns, or fork it there",
        key.id, state.lost_turn
    );
    Error::new(Kind::Conflict, "session_damaged", message)
        .with_param("instance_id")
        .with_detail("turns", turns)
}

fn exists(key: &SessionKey) -> Error {
    let message = format!("session {} exists already; end it first", key.id);
    Error::new(Kind::Conflict, "session_exists", message).with_param("session_id")
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

    /// Whether there is no live session.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Live sessions of a tenant.
    pub fn count_of(&self, tenant: u32) -> usize {
        self.counts.get(&tenant).copied().unwrap_or(0)
    }

    /// Marks the session busy with `request` and returns the history for its turn.
    ///
    /// # Errors
    /// `session_busy` (409) while another turn runs; `session_not_found`, `session_expired` or `session_lost` (404);
    /// `session_exists` (409); `session_damaged` (409) for one that has lost turns.
    pub fn begin(
        &mut self,
        key: &SessionKey,
        request: u64,
        start: Start,
        now_ms: u64,
    ) -> Result<TurnHistory> {
        self.expire(now_ms);
        let Some(session) = self.sessions.get_mut(key) else {
            // A client that continues an evicted session must get an error, not an empty history.
            let goes_on = matches!(start, Start::Continue | Start::Mend)
                || (start == Start::Create && self.tombstones.get(key).is_some());
            if goes_on {
                return Err(self.missing(key));
            }
            let session = Session {
                state: SessionState::new(now_ms),
                running: Some(Running {
                    request,
                    fresh: true,
                    hold_until: 0,
                }),
                hold_until: 0,
            };
            self.insert(key.clone(), session);
            self.evict_over_cap(key.tenant);
            return Ok(TurnHistory::empty());
        };
        if session.running.is_some() {
            return Err(session_busy(key));
        }
        if start == Start::New {
            return Err(exists(key));
        }
        let state = &session.state;
        if state.lost_turn > 0 && matches!(start, Start::Continue | Start::Create) {
            return Err(session_damaged(key, state));
        }
        self.idle.remove(state.used_order, key);
        let fresh = start == Start::Fresh;
        session.running = Some(Running {
            request,
            fresh,
            hold_until: 0,
        });
        Ok(if fresh {
            TurnHistory {
                replaced_turns: session.state.turns.len(),
                ..TurnHistory::empty()
            }
        } else {
            session.state.base()
        })
    }

    /// Ends the running turn of `request` and makes its outcome the session's state. A turn that is no longer running is ignored.
    pub fn commit(&mut self, key: &SessionKey, request: u64, commit: Commit, now_ms: u64) {
        if let Some(outcome) = self.outcome(key, request, commit, now_ms) {
            self.settle(key, request, outcome);
        }
    }

    /// What [`Self::commit`] would make of the session, so that it can be written to the log first. None if the turn is not running.
    pub fn outcome(
        &mut self,
        key: &SessionKey,
        request: u64,
        commit: Commit,
        now_ms: u64,
    ) -> Option<Outcome> {
        let session = self.sessions.get_mut(key)?;
        let running = session.running.as_mut();
        let running = running.filter(|r| r.request == request)?;
        running.hold_until = commit.hold_ms.map_or(0, |hold_ms| now_ms + hold_ms);
        let state = &session.state;
        let after = (!commit.end).then(|| SessionState {
            tokens: commit.tokens.into(),
            turns: commit.turns.into(),
            seed: commit.seed,
            system_tokens: commit.system_tokens,
            adapter: commit.adapter,
            created_ms: if let Some(created_ms) = commit.created_ms {
                created_ms.min(now_ms)
            } else if running.fresh {
                now_ms
            } else {
                state.created_ms
            },
            used_ms: now_ms,
            used_order: self.uses + 1,
            lost_turn: 0,
            usage: if running.fresh {
                commit.usage
            } else {
                state.usage + commit.usage
            },
        });
        self.uses += 1;
        let before = (!state.turns.is_empty()).then(|| state.clone());
        Some(Outcome { before, after })
    }

    /// Ends the running turn of `request` with the outcome that [`Self::outcome`] returned.
    pub fn settle(&mut self, key: &SessionKey, request: u64, outcome: Outcome) {
        let Some(session) = self.running_mut(key, request) else {
            return;
        };
        let running = session.running.take();
        session.hold_until = running.map_or(0, |running| running.hold_until);
        let hold_until = session.hold_until;
        let Some(after) = outcome.after else {
            self.take(key);
            self.tombstones.remove(key);
            return;
        };
        let before = std::mem::replace(&mut session.state, after.clone());
        self.totals.add(&after);
        self.totals.remove(&before);
        self.idle.insert(after.used_order, hold_until, key);
        self.tombstones.remove(key);
        self.evict_over_cap(key.tenant);
    }

    /// Ends the running turn of `request` and leaves the session at its last committed turn.
    pub fn rollback(&mut self, key: &SessionKey, request: u64) {
        let Some(session) = self.running_mut(key, request) else {
            return;
        };
        session.running = None;
        let (empty, used_order) = (session.state.turns.is_empty(), session.state.used_order);
        let hold_until = session.hold_until;
        if empty {
            self.take(key);
        } else {
            self.idle.insert(used_order, hold_until, key);
        }
        self.evict_over_cap(key.tenant);
    }

    /// Holds an idle session until then. 0 ends the hold.
    ///
    /// # Errors
    /// `session_not_found`, `session_expired` or `session_lost` (404).
    pub fn hold(&mut self, key: &SessionKey, until_ms: u64) -> Result<()> {
        let Some(session) = self.sessions.get_mut(key) else {
            return Err(self.missing(key));
        };
        session.hold_until = until_ms;
        let (idle, used_order) = (session.running.is_none(), session.state.used_order);
        if idle {
            self.idle.remove(used_order, key);
            self.idle.insert(used_order, until_ms, key);
        }
        Ok(())
    }

    fn running_mut(&mut self, key: &SessionKey, request: u64) -> Option<&mut Session> {
        self.sessions
            .get_mut(key)
            .filter(|s| s.running.as_ref().is_some_and(|r| r.request == request))
    }

    /// The request whose turn is running in the session, if there is one.
    pub fn running_request(&self, key: &SessionKey) -> Option<u64> {
        self.sessions
            .get(key)?
            .running
            .as_ref()
            .map(|running| running.request)
    }

    /// A session without its tokens.
    ///
    /// # Errors
    /// `session_not_found`, `session_expired` or `session_lost` (404).
    pub fn info(&self, key: &SessionKey) -> Result<SessionInfo> {
        Ok(self.get(key)?.info(key))
    }

    /// A session at its last committed turn, even while another one is running.
    ///
    /// # Errors
    /// `session_not_found`, `session_expired` or `session_lost` (404).
    pub fn state(&self, key: &SessionKey) -> Result<&SessionState> {
        Ok(&self.get(key)?.state)
    }

    /// At most `limit` sessions of a tenant in order of their ids, numbers before names: those after `after`, or the first ones.
    pub fn list(&self, tenant: u32, after: Option<SessionId>, limit: usize) -> Vec<SessionInfo> {
        let first = match after {
            None => Bound::Included(SessionKey::new(tenant, SessionId::FIRST_OF_CLIENTS)),
            Some(id) => Bound::Excluded(SessionKey::new(tenant, id)),
        };
        let range = self.sessions.range((first, Bound::Unbounded));
        let page = range
            .take_while(|(key, _)| key.tenant == tenant)
            .take(limit);
        page.map(|(key, session)| session.info(key)).collect()
    }

    fn get(&self, key: &SessionKey) -> Result<&Session> {
        self.sessions.get(key).ok_or_else(|| self.missing(key))
    }

    fn insert(&mut self, key: SessionKey, session: Session) {
        self.totals.add(&session.state);
        *self.counts.entry(key.tenant).or_default() += 1;
        self.sessions.insert(key, session);
    }

    fn take(&mut self, key: &SessionKey) -> Option<Session> {
        let session = self.sessions.remove(key)?;
        self.totals.remove(&session.state);
        if let Some(count) = self.counts.get_mut(&key.tenant) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&key.tenant);
            }
        }
        Some(session)
    }

    fn missing(&self, key: &SessionKey) -> Error {
        let (code, why) = match self.tombstones.get(key) {
            Some(Gone::Evicted) => ("session_expired", "was evicted"),
            Some(Gone::Lost) => ("session_lost", "is lost, because its log was damaged"),
            Some(Gone::Ended) | None => ("session_not_found", "does not exist"),
        };
        let message = format!(
            "session {} {why}; start it with sequence_start=true",
            key.id
        );
        Error::new(Kind::NotFound, code, message).with_param("instance_id")
    }
}

impl Session {
    fn info(&self, key: &SessionKey) -> SessionInfo {
        SessionInfo {
            key: key.clone(),
            turns: self.state.turns.len(),
            tokens: self.state.tokens.len(),
            busy: self.running.is_some(),
            created_ms: self.state.created_ms,
            used_ms: self.state.used_ms,
            lost_turn: self.state.lost_turn,
            usage: self.state.usage,
            hold_until: self.hold_until,
        }
    }
}
