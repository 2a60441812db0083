//! What the records of a log come to, one after the other, whatever is missing among them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::frame::{DROP, HEADER, Head, Marker, PADDING, PUT};
use super::record::Put;
use super::{Fingerprint, TenantTag};
use crate::request::SessionId;
use crate::session::ledger::SessionUsage;
use crate::session::state::{AdapterDigest, Gone, SessionState, Turn};

/// A session as the log names it.
pub(super) type Name = (TenantTag, SessionId);

/// What a log says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) fingerprint: Fingerprint,
    pub(super) model: String,
    /// Absent in the first version of the format.
    pub(super) marker: Option<Marker>,
}

/// A session while its log is read.
#[derive(Debug, Default)]
struct Growing {
    tokens: Vec<u32>,
    turns: Vec<Turn>,
    seed: u64,
    system_tokens: usize,
    created_ms: u64,
    used_ms: u64,
    used_order: u64,
    /// The record that made it what it is.
    seq: u64,
    /// The last lost turn; the turns after `turns` up to it are lost. 0: none.
    lost_turn: u32,
    usage: SessionUsage,
    adapter: Option<AdapterDigest>,
}

/// What a whole record says.
#[expect(
    clippy::large_enum_variant,
    reason = "one at a time is read, and almost all are of the large kind"
)]
pub(super) enum Said {
    Nothing,
    /// What a session has become, as a difference from what the record `prev` made of it.
    Put {
        name: Name,
        prev: u64,
        put: Put,
    },
    Drop(Name, Gone),
}

impl Said {
    /// None where the record is none of this format.
    pub(super) fn parse(head: &Head, body: &[u8]) -> Option<Self> {
        let name = || Some((head.tenant, SessionId::from_log(&head.id)?));
        match head.kind {
            // Of the header there are two.
            HEADER | PADDING => Some(Self::Nothing),
            PUT => Some(Self::Put {
                name: name()?,
                prev: head.prev,
                put: Put::parse(body).filter(|put| put.turns_after() == head.turns)?,
            }),
            DROP => Some(Self::Drop(name()?, Gone::parse(body)?)),
            _ => None,
        }
    }
}

/// What a damaged record took from a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Missing {
    pub(super) name: Name,
    /// Turns that the session still has; 0: it is gone.
    pub(super) kept_turns: u32,
    /// Turns that it had in the last record that is lost or cannot follow.
    pub(super) last_turn: u32,
}

/// What a log holds.
#[derive(Debug, Default)]
pub(super) struct Replay {
    pub(super) header: Option<Header>,
    sessions: BTreeMap<Name, Growing>,
    /// Sessions that are gone but not by their clients, and how many records came before each one's end.
    gone: BTreeMap<Name, (u64, Gone)>,
    /// What is missing of which session.
    losses: BTreeMap<Name, u32>,
    records: u64,
    /// The last record's number.
    pub(super) seq: u64,
    /// Records that are missing, by their numbers, and those of them that could be named.
    missing: u64,
    named: u64,
    /// Bytes of whole records, the magic and the header among them.
    pub(super) good: u64,
    /// Bytes of the file.
    pub(super) end: u64,
    /// Where there are no whole records, in the middle.
    pub(super) damaged: Vec<Range<u64>>,
    /// An end that was written in part.
    pub(super) torn: Range<u64>,
}

impl Replay {
    /// Takes a whole record in.
    pub(super) fn take(&mut self, seq: u64, said: Said) {
        self.missing += seq.saturating_sub(self.seq + 1);
        self.seq = self.seq.max(seq);
        match said {
            Said::Nothing => {}
            Said::Put { name, prev, put } => {
                let before = self.sessions.get(&name);
                let follows = put.is_whole() || before.is_some_and(|s| s.seq == prev);
                self.put(name, &put, follows, seq);
            }
            Said::Drop(name, gone) => self.drop(name, gone),
        }
    }

    /// A session became something; `follows`: of what it is now.
    pub(super) fn put(&mut self, name: Name, put: &Put, follows: bool, seq: u64) {
        self.records += 1;
        let before = self.sessions.get(&name);
        let (tokens, turns) = before.map_or((0, &[][..]), |s| (s.tokens.len(), &s.turns));
        if !follows || !put.fits(tokens, turns) {
            self.lose(name, put.turns_after());
            return;
        }
        self.gone.remove(&name);
        self.losses.remove(&name);
        let session = self.sessions.entry(name).or_default();
        put.apply(&mut session.tokens, &mut session.turns);
        session.seed = put.seed;
        session.system_tokens = put.system_tokens as usize;
        session.created_ms = put.created_ms;
        session.used_ms = put.used_ms;
        session.used_order = put.used_order;
        session.seq = seq;
        session.lost_turn = put.lost_turn;
        session.usage = put.usage;
        session.adapter = put.adapter;
    }

    pub(super) fn drop(&mut self, name: Name, gone: Gone) {
        self.records += 1;
        self.sessions.remove(&name);
        self.gone.remove(&name);
        self.losses.remove(&name);
        if gone != Gone::Ended {
            self.gone.insert(name, (self.records, gone));
        }
    }

    /// Whether a change of the session is missing: what follows a state that is not known is not to be believed.
    pub(super) fn has_lost(&self, name: &Name) -> bool {
        self.losses.contains_key(name)
    }

    /// A damaged record whose head is readable: the session had this many turns after it.
    pub(super) fn lose_named(&mut self, name: Name, turns: u32) {
        self.named += 1;
        self.lose(name, turns);
    }

    /// So many records are damaged whose numbers no later record can miss.
    pub(super) const fn lose_numbers(&mut self, records: u64) {
        self.missing += records;
    }

    fn lose(&mut self, name: Name, turns: u32) {
        let last = self.losses.entry(name).or_default();
        *last = turns.max(*last);
    }

    /// What is missing of the sessions that were not begun anew since.
    pub(super) fn losses(&self) -> Vec<Missing> {
        let missing = self.losses.iter().map(|(name, &last_turn)| Missing {
            kept_turns: (self.sessions.get(name)).map_or(0, |s| s.turns.len() as u32),
            name: name.clone(),
            last_turn,
        });
        missing.collect()
    }

    /// The tenants of all sessions, of those that are gone, and of those that are lost.
    pub(super) fn tenants(&self) -> BTreeSet<TenantTag> {
        let names = self.sessions.keys().chain(self.gone.keys());
        names.chain(self.losses.keys()).map(|name| name.0).collect()
    }

    /// Turns of all sessions.
    pub(super) fn turns(&self) -> usize {
        self.sessions
            .values()
            .map(|session| session.turns.len())
            .sum()
    }

    /// Number of missing records of unknown sessions.
    pub(super) const fn unnamed(&self) -> u64 {
        self.missing.saturating_sub(self.named)
    }

    /// Whether something in the middle is not as it was written.
    pub(super) fn is_damaged(&self) -> bool {
        !self.damaged.is_empty() || self.missing > 0 || !self.losses.is_empty()
    }

    /// The sessions with their records' numbers, and those that are gone in order of their ends.
    #[allow(clippy::type_complexity)]
    pub(super) fn take_sessions(&mut self) -> (Vec<(Name, u64, SessionState)>, Vec<(Name, Gone)>) {
        let mut lost = Vec::new();
        for missing in self.losses() {
            match self.sessions.get_mut(&missing.name) {
                Some(session) => {
                    session.lost_turn = missing.last_turn.max(missing.kept_turns + 1);
                }
                None => lost.push((missing.name, Gone::Lost)),
            }
        }
        let sessions = std::mem::take(&mut self.sessions).into_iter();
        let states = sessions.map(|(name, session)| (name, session.seq, session.into_state()));
        let mut gone: Vec<_> = std::mem::take(&mut self.gone).into_iter().collect();
        gone.sort_unstable_by_key(|(_, (order, _))| *order);
        let gone = gone.into_iter().map(|(name, (_, gone))| (name, gone));
        (states.collect(), gone.chain(lost).collect())
    }
}

impl Growing {
    fn into_state(self) -> SessionState {
        SessionState {
            tokens: self.tokens.into(),
            turns: self.turns.into(),
            seed: self.seed,
            system_tokens: self.system_tokens,
            created_ms: self.created_ms,
            used_ms: self.used_ms,
            used_order: self.used_order,
            lost_turn: self.lost_turn,
            usage: self.usage,
            adapter: self.adapter,
        }
    }
}
