//! A cache of compiled grammars with a limit in bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::matcher::Matcher;

#[derive(Debug)]
struct Entry {
    matcher: Arc<Matcher>,
    bytes: usize,
    used: u64,
}

/// Compiled grammars by [`super::Grammar::key`]. The least recently used are evicted first.
#[derive(Debug)]
pub struct GrammarCache {
    entries: HashMap<String, Entry>,
    by_use: BTreeMap<u64, String>,
    bytes: usize,
    max_bytes: usize,
    clock: u64,
}

impl GrammarCache {
    /// An empty cache of up to `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            entries: HashMap::new(),
            by_use: BTreeMap::new(),
            bytes: 0,
            max_bytes,
            clock: 0,
        }
    }

    /// Its approximate size.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The matcher at the beginning of a grammar, to be forked.
    pub fn get(&mut self, key: &str) -> Option<Arc<Matcher>> {
        let entry = self.entries.get_mut(key)?;
        self.clock += 1;
        if let Some(key) = self.by_use.remove(&entry.used) {
            self.by_use.insert(self.clock, key);
        }
        entry.used = self.clock;
        Some(Arc::clone(&entry.matcher))
    }

    /// Adds a matcher of `bytes` bytes, unless it is larger than the whole cache.
    pub fn insert(&mut self, key: String, matcher: Arc<Matcher>, bytes: usize) {
        let bytes = bytes + 2 * key.len();
        if bytes > self.max_bytes || self.entries.contains_key(&key) {
            return;
        }
        self.clock += 1;
        self.bytes += bytes;
        self.by_use.insert(self.clock, key.clone());
        let used = self.clock;
        self.entries.insert(
            key,
            Entry {
                matcher,
                bytes,
                used,
            },
        );
        while self.bytes > self.max_bytes {
            let Some((_, oldest)) = self.by_use.pop_first() else {
                break;
            };
            if let Some(entry) = self.entries.remove(&oldest) {
                self.bytes -= entry.bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> String {
        name.to_owned()
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let matcher = || {
            Arc::new(Matcher::new(
                llguidance::Matcher::new(Err(std::fmt::Error.into())),
                1,
            ))
        };
        let mut cache = GrammarCache::new(100);
        for name in ["a", "b", "c"] {
            cache.insert(key(name), matcher(), 30);
        }
        assert_eq!(cache.bytes(), 96);
        assert!(cache.get("a").is_some());
        cache.insert(key("d"), matcher(), 30);
        assert!(cache.get("b").is_none());
        assert!(cache.get("a").is_some() && cache.get("c").is_some());
        cache.insert(key("huge"), matcher(), 101);
        assert!(cache.get("huge").is_none());
        assert_eq!(cache.bytes(), 96);
    }
}
