//! Which sessions the store lets go: the ones unused for too long, and the least recently used where there are too many.

use super::super::state::{Gone, SessionKey};
use super::SessionStore;

impl SessionStore {
    /// Bounds the sessions of one tenant, beside the server's own bound; its least recently used idle one goes first.
    pub fn set_tenant_cap(&mut self, tenant: u32, max_sessions: usize) {
        self.tenant_caps.insert(tenant, max_sessions);
        self.evict_over_cap(tenant);
    }

    /// Drops idle sessions older than the time to live.
    pub fn expire(&mut self, now_ms: u64) {
        self.idle.let_go(now_ms);
        if self.limits.ttl_ms == 0 {
            return;
        }
        while let Some(key) = self.idle.oldest_free() {
            let used_ms = self.sessions.get(&key).map_or(0, |s| s.state.used_ms);
            if used_ms.saturating_add(self.limits.ttl_ms) > now_ms {
                break;
            }
            self.evict(key);
        }
    }

    pub(super) fn evict_over_cap(&mut self, tenant: u32) {
        if let Some(&cap) = self.tenant_caps.get(&tenant) {
            while self.count_of(tenant) > cap {
                let Some(key) = self.idle.oldest_of(tenant) else {
                    break;
                };
                self.evict(key);
            }
        }
        while self.sessions.len() > self.limits.max_sessions {
            let Some(key) = self.idle.oldest() else {
                break;
            };
            self.evict(key);
        }
    }

    fn evict(&mut self, key: SessionKey) {
        if let Some(session) = self.take(&key) {
            self.idle.remove(session.state.used_order, &key);
            self.tombstones.insert(key.clone(), Gone::Evicted);
            if let Some(evicted) = &mut self.evicted {
                evicted.push_back(key);
            }
        }
    }
}
