//! The records of a session log, kept as simply as can be, and what they must bring back.

use std::collections::{BTreeMap, BTreeSet};

use super::check::{Check, ensure};
use super::frames::Frame;
use crate::session::{Restored, SessionKey, SessionState, SessionStore, Turn};

/// A session as its turns must leave it.
#[derive(Debug, Clone, Default)]
pub(super) struct Session {
    pub(super) tokens: Vec<u32>,
    /// Where each turn ends.
    pub(super) turns: Vec<usize>,
    pub(super) running: Option<u64>,
    /// The last of the turns that a damaged record took; it is read-only then. 0: none.
    pub(super) lost_turn: u32,
    pub(super) used_ms: u64,
    /// A number that grows with every commit.
    pub(super) used_order: u64,
}

impl Session {
    /// A session as the core has it.
    pub(super) fn of(state: &SessionState) -> Self {
        Self {
            tokens: state.tokens.to_vec(),
            turns: state.turns.iter().map(Turn::end).collect(),
            running: None,
            lost_turn: state.lost_turn,
            used_ms: state.used_ms,
            used_order: state.used_order,
        }
    }
}

/// What a log brings back.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    pub(super) sessions: BTreeMap<SessionKey, Session>,
    /// Those of which it is known that they are gone.
    pub(super) gone: BTreeSet<SessionKey>,
    /// Of them all, the one that lost something to a damaged record.
    pub(super) damaged: Option<SessionKey>,
}

/// What a record made of its session.
#[derive(Debug, Clone)]
pub(super) enum Entry {
    Put(Session),
    Ended,
    /// It was evicted, or is lost.
    Gone,
}

impl Known {
    /// The records of a file that has just been written.
    pub(super) fn records(self) -> Records {
        let mut records = Records::new();
        for (key, session) in self.sessions {
            add(&mut records, &key, Entry::Put(session));
        }
        for key in self.gone {
            add(&mut records, &key, Entry::Gone);
        }
        records
    }
}

/// The records of a file, each session's in order.
pub(super) type Records = BTreeMap<SessionKey, Vec<Entry>>;

pub(super) fn add(records: &mut Records, key: &SessionKey, entry: Entry) {
    records.entry(key.clone()).or_default().push(entry);
}

/// Holds what a log says it has lost to what it must have.
pub(super) fn check_restored(restored: &Restored, damaged: Option<&SessionKey>) -> Check {
    let losses = restored.losses.iter();
    let lost: Vec<_> = losses
        .map(|loss| (loss.tenant, Some(loss.id.clone())))
        .collect();
    let damaged = damaged.map(|key| (Some(key.tenant), Some(key.id.clone())));
    ensure(
        lost == Vec::from_iter(damaged) && restored.unnamed == 0,
        || format!("a log says that it lost {restored:?}"),
    )
}

/// What the records of a file bring back, one of which may be damaged: it takes with it what follows from it.
pub(super) fn bring_back(
    records: &Records,
    frames: &[Frame],
    hit: Option<usize>,
) -> Result<Known, String> {
    let mut known = Known::default();
    let mut places = BTreeMap::<&SessionKey, usize>::new();
    let hit_key = hit.map(|hit| &frames[hit].key);
    // The last turn that is lost of the session that is hit.
    let mut lost = None;
    for (at, frame) in frames.iter().enumerate() {
        let key = &frame.key;
        let place = places.entry(key).or_default();
        let entry = records.get(key).and_then(|entries| entries.get(*place));
        let entry = entry.ok_or_else(|| format!("{key:?} has records that nobody wrote"))?;
        *place += 1;
        if hit_key == Some(key) {
            let follows = !matches!(entry, Entry::Put(_)) || frame.whole || lost.is_none();
            if hit == Some(at) || !follows {
                lost = lost.max(Some(frame.turns));
                continue;
            }
            lost = None;
        }
        known.gone.remove(key);
        known.sessions.remove(key);
        match entry {
            Entry::Put(session) => drop(known.sessions.insert(key.clone(), session.clone())),
            Entry::Gone => drop(known.gone.insert(key.clone())),
            Entry::Ended => {}
        }
    }
    if let (Some(key), Some(last)) = (hit_key, lost) {
        known.damaged = Some(key.clone());
        if let Some(session) = known.sessions.get_mut(key) {
            session.lost_turn = last.max(session.turns.len() as u32 + 1);
        } else {
            known.gone.insert(key.clone());
        }
    }
    Ok(known)
}

/// Holds a store to what it must be.
pub(super) fn check_store(store: &SessionStore, sessions: &BTreeMap<SessionKey, Session>) -> Check {
    ensure(store.len() == sessions.len(), || {
        format!("{} sessions, not {}", store.len(), sessions.len())
    })?;
    let mut tokens = 0;
    for (key, session) in sessions {
        let state = store.state(key).map_err(|error| error.message)?;
        ensure(*state.tokens == session.tokens, || {
            format!("{key:?} has other tokens")
        })?;
        let ends = state.turns.iter().map(Turn::end);
        ensure(ends.eq(session.turns.iter().copied()), || {
            format!(
                "{key:?} has the turns {:?}, not {:?}",
                state.turns, session.turns
            )
        })?;
        ensure(state.lost_turn == session.lost_turn, || {
            format!(
                "{key:?} has lost turns up to {}, not {}",
                state.lost_turn, session.lost_turn
            )
        })?;
        tokens += session.tokens.len();
    }
    ensure(store.tokens() == tokens, || {
        format!("{} tokens, not {tokens}", store.tokens())
    })
}
