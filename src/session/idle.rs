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
    /// Idle, too, but asked to be kept until some time: in order of these times, with the numbers of their last uses.
    held: BTreeSet<(u64, SessionKey)>,
    orders: HashMap<SessionKey, (u64, u64)>,
}

impl Idle {
    /// A session is idle; `hold_until`: it is to be kept until then, where others can go.
    pub(super) fn insert(&mut self, used_order: u64, hold_until: u64, key: &SessionKey) {
        if hold_until > 0 {
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

    /// Those that were held until now are idle as all others.
    pub(super) fn let_go(&mut self, now_ms: u64) {
        while let Some((until, key)) = self.held.first().cloned()
            && until <= now_ms
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

    /// The session that makes room next: the least recently used one, and where all are held, the one that is for the shortest.
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
