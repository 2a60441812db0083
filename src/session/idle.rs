//! Which session is dropped next, and which ones were dropped.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::state::{Gone, SessionKey};
use crate::request::SessionId;

/// Number of ids that are remembered, to tell `session_expired` and `session_lost` from `session_not_found`.
const MAX_TOMBSTONES: usize = 65_536;

/// Idle sessions in order of last use: all of them, and each tenant's. The order is that of uses, not of a clock.
#[derive(Debug, Default)]
pub(super) struct Idle {
    all: BTreeSet<(u64, SessionKey)>,
    by_tenant: BTreeSet<(u32, u64, SessionId)>,
    /// Idle sessions that are held until some time, in the order of these times.
    held: BTreeSet<(u64, SessionKey)>,
    orders: HashMap<SessionKey, (u64, u64)>,
    /// The latest time that [`Self::let_go`] was told. A hold that ended before it is none.
    seen_ms: u64,
}

impl Idle {
    /// Adds an idle session. `hold_until`: until then, it is dropped only after those that nobody holds.
    pub(super) fn insert(&mut self, used_order: u64, hold_until: u64, key: &SessionKey) {
        if hold_until > self.seen_ms {
            self.held.insert((hold_until, key.clone()));
            self.orders.insert(key.clone(), (used_order, hold_until));
            return;
        }
        self.all.insert((used_order, key.clone()));
        let of_tenant = (key.tenant, used_order, key.id.clone());
        self.by_tenant.insert(of_tenant);
    }

    pub(super) fn remove(&mut self, used_order: u64, key: &SessionKey) {
        if let Some((_, until)) = self.orders.remove(key) {
            self.held.remove(&(until, key.clone()));
            return;
        }
        self.all.remove(&(used_order, key.clone()));
        let of_tenant = (key.tenant, used_order, key.id.clone());
        self.by_tenant.remove(&of_tenant);
    }

    /// Sessions whose hold has ended become ordinary idle sessions.
    pub(super) fn let_go(&mut self, now_ms: u64) {
        self.seen_ms = self.seen_ms.max(now_ms);
        while let Some((until, key)) = self.held.first().cloned()
            && until <= self.seen_ms
        {
            let used_order = self.orders.get(&key).map_or(0, |&(order, _)| order);
            self.remove(used_order, &key);
            self.insert(used_order, 0, &key);
        }
    }

    /// The least recently used session that nobody holds.
    pub(super) fn oldest_free(&self) -> Option<SessionKey> {
        self.all.first().map(|(_, key)| key.clone())
    }

    /// The session to drop next: the least recently used one that nobody holds, or else the one whose hold ends first.
    pub(super) fn oldest(&self) -> Option<SessionKey> {
        let held = || self.held.first().map(|(_, key)| key.clone());
        self.oldest_free().or_else(held)
    }

    /// A tenant's least recently used session.
    pub(super) fn oldest_of(&self, tenant: u32) -> Option<SessionKey> {
        let first = (tenant, 0, SessionId::FIRST);
        let free = self.by_tenant.range(first..).next();
        let free = free.filter(|(owner, _, _)| *owner == tenant);
        if let Some((_, _, id)) = free {
            return Some(SessionKey::new(tenant, id.clone()));
        }
        let mut held = self.held.iter().map(|(_, key)| key);
        held.find(|key| key.tenant == tenant).cloned()
    }
}

/// The latest ids of sessions that are gone but were not ended by their clients.
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

    /// A session with this id is live again, or was ended by its client.
    pub(super) fn remove(&mut self, key: &SessionKey) {
        self.stamps.remove(key);
    }
}
