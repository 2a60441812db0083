//! Which session goes next, and which ones have gone.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::state::SessionKey;

/// Evicted ids that are remembered, to tell `session_expired` from `session_not_found`.
const MAX_TOMBSTONES: usize = 65_536;

/// When a session was last used. Turns may end within one millisecond, so `order` tells which came later; it is 0 for what a log
/// brought back.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Used {
    pub(super) ms: u64,
    pub(super) order: u64,
}

/// Idle sessions in order of last use: all of them, and each tenant's.
#[derive(Debug, Default)]
pub(super) struct Idle {
    all: BTreeSet<(Used, SessionKey)>,
    by_tenant: BTreeSet<(u32, Used, i64)>,
}

impl Idle {
    pub(super) fn insert(&mut self, used: Used, key: SessionKey) {
        self.all.insert((used, key));
        self.by_tenant.insert((key.tenant, used, key.id));
    }

    pub(super) fn remove(&mut self, used: Used, key: SessionKey) {
        self.all.remove(&(used, key));
        self.by_tenant.remove(&(key.tenant, used, key.id));
    }

    /// The least recently used session.
    pub(super) fn oldest(&self) -> Option<(Used, SessionKey)> {
        self.all.first().copied()
    }

    /// A tenant's least recently used session.
    pub(super) fn oldest_of(&self, tenant: u32) -> Option<SessionKey> {
        let first = (tenant, Used::default(), i64::MIN);
        let &(owner, _, id) = self.by_tenant.range(first..).next()?;
        (owner == tenant).then_some(SessionKey { tenant, id })
    }
}

/// The ids of evicted sessions, the latest ones.
#[derive(Debug, Default)]
pub(super) struct Tombstones {
    stamps: HashMap<SessionKey, u64>,
    order: VecDeque<(u64, SessionKey)>,
    next: u64,
}

impl Tombstones {
    pub(super) fn contains(&self, key: SessionKey) -> bool {
        self.stamps.contains_key(&key)
    }

    pub(super) fn insert(&mut self, key: SessionKey) {
        let stamp = self.next;
        self.next += 1;
        self.stamps.insert(key, stamp);
        self.order.push_back((stamp, key));
        while self.order.len() > MAX_TOMBSTONES {
            if let Some((stamp, key)) = self.order.pop_front()
                && self.stamps.get(&key) == Some(&stamp)
            {
                self.stamps.remove(&key);
            }
        }
    }

    /// All of them, the latest ones last.
    pub(super) fn all(&self) -> Vec<SessionKey> {
        let live = |&&(stamp, key): &&(u64, SessionKey)| self.stamps.get(&key) == Some(&stamp);
        self.order
            .iter()
            .filter(live)
            .map(|&(_, key)| key)
            .collect()
    }

    /// A session of this id lives again, or was ended by its client.
    pub(super) fn remove(&mut self, key: SessionKey) {
        self.stamps.remove(&key);
    }
}
