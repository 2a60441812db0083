//! Contents, or what is known of them, in order of last use, and no more bytes than a bound.

use std::collections::{BTreeMap, HashMap};

use super::key::Key;

#[derive(Debug)]
struct Held<V> {
    value: V,
    bytes: u64,
    used: u64,
}

/// A bounded map that gives up first what was used least recently.
#[derive(Debug)]
pub(super) struct Shelf<V> {
    most: u64,
    bytes: u64,
    held: HashMap<Key, Held<V>>,
    by_use: BTreeMap<u64, Key>,
    /// Counts uses.
    uses: u64,
}

impl<V> Shelf<V> {
    pub(super) fn new(most: u64) -> Self {
        Self {
            most,
            bytes: 0,
            held: HashMap::new(),
            by_use: BTreeMap::new(),
            uses: 0,
        }
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether a content of that size would ever fit.
    pub(super) const fn fits(&self, bytes: u64) -> bool {
        bytes <= self.most
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.held.contains_key(key)
    }

    /// A content, which is the one that was used last then.
    pub(super) fn get(&mut self, key: &Key) -> Option<&V> {
        let held = self.held.get_mut(key)?;
        self.by_use.remove(&held.used);
        self.uses += 1;
        held.used = self.uses;
        self.by_use.insert(held.used, *key);
        Some(&held.value)
    }

    /// Gives up what was used least recently, until there is room for so many bytes more.
    pub(super) fn make_room(&mut self, bytes: u64) -> Vec<(Key, V)> {
        let mut given_up = Vec::new();
        while self.bytes + bytes > self.most {
            let Some((_, key)) = self.by_use.pop_first() else {
                break;
            };
            if let Some(held) = self.held.remove(&key) {
                self.bytes -= held.bytes;
                given_up.push((key, held.value));
            }
        }
        given_up
    }

    /// Adds a content that [`Self::fits`], in place of one of that name, and returns what it gave up for it.
    pub(super) fn insert(&mut self, key: Key, value: V, bytes: u64) -> Vec<(Key, V)> {
        self.remove(&key);
        let given_up = self.make_room(bytes);
        self.uses += 1;
        let used = self.uses;
        self.held.insert(key, Held { value, bytes, used });
        self.by_use.insert(used, key);
        self.bytes += bytes;
        given_up
    }

    pub(super) fn remove(&mut self, key: &Key) -> Option<V> {
        let held = self.held.remove(key)?;
        self.by_use.remove(&held.used);
        self.bytes -= held.bytes;
        Some(held.value)
    }
}

#[cfg(test)]
mod tests {
    use super::super::key::Digest;
    use super::*;

    #[test]
    fn what_was_used_least_recently_goes_first() {
        let key = |at: u32| Digest::root(&[]).block(&[at]).block_key();
        let mut shelf = Shelf::new(10);
        assert!(shelf.fits(10) && !shelf.fits(11));
        for at in 0..3 {
            assert_eq!(shelf.insert(key(at), at, 3), []);
        }
        assert_eq!(shelf.get(&key(0)), Some(&0));
        assert_eq!(shelf.insert(key(3), 3, 4), [(key(1), 1)]);
        assert_eq!(shelf.insert(key(0), 5, 1), []);
        assert_eq!((shelf.len(), shelf.bytes()), (3, 8));
        assert_eq!(shelf.make_room(9), [(key(2), 2), (key(3), 3)]);
        assert_eq!(shelf.remove(&key(0)), Some(5));
        assert_eq!(shelf.get(&key(0)), None);
        assert_eq!(shelf.bytes(), 0);
    }
}
