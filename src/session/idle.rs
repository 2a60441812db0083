//! Which session goes next, and which ones have gone.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::state::{Gone, SessionKey};
use crate::request::SessionId;

/// Ids that are remembered, to tell `session_expired` and `session_lost` from `session_not_found`.
const MAX_TOMBSTONES: usize = 65_536;

/// Idle sessions in order of last use: all of them, and each tenant's. The order is that of uses, not of a clock.
#[derive(Debug, Default)]
pub(super) struct Idle {
    all: BTreeSet<(u64, SessionKey)>,
    by_tenant: BTreeSet<(u32, u64, SessionId)>,
}

impl Idle {
    pub(super) fn insert(&mut self, used_order: u64, key: &SessionKey) {
        self.all.insert((used_order, key.clone()));
        let of_tenant = (key.tenant, used_order, key.id.clone());
        self.by_tenant.insert(of_tenant);
    }

    pub(super) fn remove(&mut self, used_order: u64, key: &SessionKey) {
        self.all.remove(&(used_order, key.clone()));
        let of_tenant = (key.tenant, used_order, key.id.clone());
        self.by_tenant.remove(&of_tenant);
    }

    /// The least recently used session.
    pub(super) fn oldest(&self) -> Option<SessionKey> {
        self.all.first().map(|(_, key)| key.clone())
    }

    /// A tenant's least recently used session.
    pub(super) fn oldest_of(&self, tenant: u32) -> Option<SessionKey> {
        let first = (tenant, 0, SessionId::FIRST);
        let (owner, _, id) = self.by_tenant.range(first..).next()?;
        (*owner == tenant).then(|| SessionKey::new(tenant, id.clone()))
    }
}

/// The ids of sessions that are gone but were not ended, the latest ones.
#[derive(Debug, Default)]
pub(super) struct Tombstones {
    stamps: HashMap<SessionKey, (u64, Gone)>,
    order: VecDeque<(u64, SessionKey)>,
    next: u64,
}

impl Tombstones {
    pub(super) fn get(&self, key: &SessionKey) -> Option<Gone> {
        self.stamps.get(key).map(|&(_, gone)| gone)
    }

    pub(super) fn insert(&mut self, key: SessionKey, gone: Gone) {
        let stamp = self.next;
        self.next += 1;
        self.stamps.insert(key.clone(), (stamp, gone));
        self.order.push_back((stamp, key));
        while self.order.len() > MAX_TOMBSTONES {
            if let Some((stamp, key)) = self.order.pop_front()
                && self.stamps.get(&key).is_some_and(|live| live.0 == stamp)
            {
                self.stamps.remove(&key);
            }
        }
    }

    /// All of them, the latest ones last.
    pub(super) fn all(&self) -> Vec<(SessionKey, Gone)> {
        let all = self.order.iter().filter_map(|(stamp, key)| {
            let &(live, gone) = self.stamps.get(key)?;
            (live == *stamp).then(|| (key.clone(), gone))
        });
        all.collect()
    }

    /// A session of this id lives again, or was ended by its client.
    pub(super) fn remove(&mut self, key: &SessionKey) {
        self.stamps.remove(key);
    }
}
