//! The bookkeeping of slots of recurrent states: which are owned by the sequences that write them, and which are snapshots.
//!
//! A snapshot is the state after known tokens. Any number of sequences may begin with it, and none writes it. Like a block, it is
//! found by the chain of full blocks before it. The tokens after the last of them, its tail, are compared one by one. The tail's
//! keys and values are in a block that another sequence may continue to fill, so a sequence that begins there copies them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::chain::ChainId;
use super::lru::LruList;
use crate::tier::Key;

/// The tokens before a snapshot.
#[derive(Debug, Clone)]
struct Snapshot {
    chain: ChainId,
    /// Tokens after the chain's last block, fewer than a block has.
    tail: Vec<u32>,
    /// The block with the tail's keys and values; none if there is no tail.
    tail_block: Option<u32>,
    /// Its key in the tiers below, if there are any.
    key: Option<Key>,
}

/// A snapshot with a key, which may have been evicted.
#[derive(Debug, Clone)]
pub(super) struct NamedState {
    pub(super) key: Key,
    pub(super) slot: u32,
    pub(super) chain: ChainId,
    pub(super) tail: Vec<u32>,
    pub(super) tail_block: Option<u32>,
}

#[derive(Debug)]
struct Slots {
    /// Number of sequences that read or write each slot.
    references: Vec<u32>,
    snapshots: Vec<Option<Snapshot>>,
    free: Vec<u32>,
    evictable: LruList,
    by_chain: HashMap<ChainId, Vec<u32>>,
    stats: StateStats,
    /// Snapshots with keys that were evicted since the last call. Their slots keep them until the next step.
    evicted: Vec<NamedState>,
    /// Slots that get a state from below before the next step, and do not have it yet.
    loading: Vec<u32>,
}

/// Counters since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateStats {
    /// Snapshots that were taken.
    pub taken: u64,
    /// Sequences that began with a snapshot.
    pub hits: u64,
    /// Snapshots evicted for other states.
    pub evictions: u64,
}

/// Number of slots by use; the sum is the pool's size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateCounts {
    /// Free.
    pub free: usize,
    /// The state of a running sequence.
    pub owned: usize,
    /// A snapshot.
    pub snapshots: usize,
}

/// A snapshot that matches a prefix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) slot: u32,
    /// Number of tokens of its tail.
    pub(super) tail: usize,
    pub(super) tail_block: Option<u32>,
}

/// A fixed number of slots for recurrent states. It has one lock, which is held for a few instructions at a time.
#[derive(Debug)]
pub struct StatePool {
    num_slots: usize,
    /// A snapshot is taken at each multiple of this many tokens.
    every: usize,
    slots: Mutex<Slots>,
}

impl Slots {
    fn withdraw(&mut self, slot: u32) -> Option<Snapshot> {
        let snapshot = self.snapshots[slot as usize].take()?;
        if let Some(slots) = self.by_chain.get_mut(&snapshot.chain) {
            slots.retain(|&other| other != slot);
            if slots.is_empty() {
                self.by_chain.remove(&snapshot.chain);
            }
        }
        Some(snapshot)
    }

    /// Notes an evicted snapshot, for the tiers below.
    fn note_evicted(&mut self, slot: u32, snapshot: Snapshot) {
        if let Some(key) = snapshot.key
            && !self.loading.contains(&slot)
        {
            self.evicted.push(NamedState {
                key,
                slot,
                chain: snapshot.chain,
                tail: snapshot.tail,
                tail_block: snapshot.tail_block,
            });
        }
    }

    fn retain(&mut self, slot: u32) {
        let count = &mut self.references[slot as usize];
        if *count == 0 {
            self.evictable.remove(slot);
        }
        *count += 1;
    }
}

impl StatePool {
    pub(super) fn new(num_slots: usize, every: usize) -> Self {
        Self {
            num_slots,
            every,
            slots: Mutex::new(Slots {
                references: vec![0; num_slots],
                snapshots: vec![None; num_slots],
                free: (0..num_slots as u32).rev().collect(),
                evictable: LruList::new(num_slots),
                by_chain: HashMap::new(),
                stats: StateStats::default(),
                evicted: Vec::new(),
                loading: Vec::new(),
            }),
        }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        // Every critical section leaves the slots consistent before anything that could panic.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of slots.
    pub const fn num_slots(&self) -> usize {
        self.num_slots
    }

    /// The next position after `position` at which a snapshot is taken.
    pub const fn next_multiple(&self, position: usize) -> usize {
        (position / self.every + 1) * self.every
    }

    /// Number of slots by use.
    pub fn counts(&self) -> StateCounts {
        let slots = self.slots();
        let snapshots = slots.snapshots.iter().flatten().count();
        StateCounts {
            free: slots.free.len(),
            owned: self.num_slots - slots.free.len() - snapshots,
            snapshots,
        }
    }

    /// Counters since the start.
    pub fn stats(&self) -> StateStats {
        self.slots().stats
    }

    /// Number of sequences that hold each slot.
    pub fn references(&self) -> Vec<u32> {
        self.slots().references.clone()
    }

    /// Whether [`Self::take`] would return a slot.
    pub(super) fn has_room(&self) -> bool {
        let slots = self.slots();
        !slots.free.is_empty() || slots.evictable.len() > 0
    }

    /// A slot to write: a free one, or that of the least recently used snapshot that no sequence reads.
    pub(super) fn take(&self) -> Option<u32> {
        let mut slots = self.slots();
        let slot = if let Some(slot) = slots.free.pop() {
            slot
        } else {
            let slot = slots.evictable.pop_front()?;
            if let Some(snapshot) = slots.withdraw(slot) {
                slots.note_evicted(slot, snapshot);
            }
            slots.stats.evictions += 1;
            slot
        };
        slots.references[slot as usize] = 1;
        Some(slot)
    }

    /// Releases a slot. It becomes free, unless others read it or it is a snapshot.
    pub(super) fn release(&self, slot: u32) {
        let mut slots = self.slots();
        let count = &mut slots.references[slot as usize];
        *count -= 1;
        if *count == 0 {
            if slots.snapshots[slot as usize].is_some() {
                slots.evictable.push_back(slot);
            } else {
                slots.free.push(slot);
            }
        }
    }

    /// Makes a slot that only the caller holds a snapshot: the state after `tail`, which follows the tokens of `chain`. The tiers
    /// below know it by `key`. Returns false and changes nothing if this snapshot exists already.
    pub(super) fn publish(
        &self,
        slot: u32,
        chain: ChainId,
        tail: &[u32],
        tail_block: Option<u32>,
        key: Option<Key>,
    ) -> bool {
        let mut slots = self.slots();
        let known = slots.by_chain.get(&chain).into_iter().flatten().copied();
        let same = |&other: &u32| {
            let other = slots.snapshots[other as usize].as_ref();
            other.is_some_and(|other| other.tail == tail)
        };
        if let Some(other) = known.into_iter().find(same) {
            // The tail's block may have been evicted, or another sequence may have filled it further.
            if let Some(other) = &mut slots.snapshots[other as usize] {
                other.tail_block = tail_block;
            }
            if slots.references[other as usize] == 0 {
                slots.evictable.remove(other);
                slots.evictable.push_back(other);
            }
            return false;
        }
        slots.snapshots[slot as usize] = Some(Snapshot {
            chain,
            tail: tail.to_vec(),
            tail_block,
            key,
        });
        slots.by_chain.entry(chain).or_default().push(slot);
        slots.stats.taken += 1;
        true
    }

    /// Whether only one sequence holds a slot.
    pub(super) fn is_alone(&self, slot: u32) -> bool {
        self.slots().references[slot as usize] == 1
    }

    /// Turns a snapshot whose slot only the caller holds back into a slot to write. Returns false if another sequence reads it.
    pub(super) fn take_back(&self, slot: u32) -> bool {
        let mut slots = self.slots();
        let alone = slots.references[slot as usize] == 1;
        if alone && let Some(snapshot) = slots.withdraw(slot) {
            slots.note_evicted(slot, snapshot);
        }
        alone
    }

    /// The snapshots with keys whose tails are in a block.
    pub(super) fn named_on(&self, block: u32) -> Vec<NamedState> {
        let slots = 0..self.num_slots as u32;
        let states = slots.filter_map(|slot| self.named(slot));
        states
            .filter(|state| state.tail_block == Some(block))
            .collect()
    }

    /// The snapshot in a slot, if it has a key and is not still to be loaded.
    pub(super) fn named(&self, slot: u32) -> Option<NamedState> {
        let slots = self.slots();
        let snapshot = slots.snapshots[slot as usize].as_ref()?;
        if slots.loading.contains(&slot) {
            return None;
        }
        Some(NamedState {
            key: snapshot.key?,
            slot,
            chain: snapshot.chain,
            tail: snapshot.tail.clone(),
            tail_block: snapshot.tail_block,
        })
    }

    /// Notes that a slot gets a state from below before the next step.
    pub(super) fn note_loading(&self, slot: u32) {
        self.slots().loading.push(slot);
    }

    /// Notes that everything has been loaded.
    pub(super) fn note_loaded(&self) {
        self.slots().loading.clear();
    }

    /// The snapshots with keys that were evicted since the last call.
    pub(super) fn take_evicted(&self) -> Vec<NamedState> {
        std::mem::take(&mut self.slots().evicted)
    }

    /// Forgets the snapshot in a slot, if there is one.
    pub(super) fn forget(&self, slot: u32) {
        let mut slots = self.slots();
        if slots.withdraw(slot).is_some() && slots.references[slot as usize] == 0 {
            slots.evictable.remove(slot);
            slots.free.push(slot);
        }
    }

    /// Forgets all snapshots.
    pub(super) fn forget_all(&self) {
        for slot in 0..self.num_slots as u32 {
            self.forget(slot);
        }
        self.slots().evicted.clear();
    }

    /// The snapshot on `chain` whose tail is the longest with which `tokens` begin. Only `usable` snapshots longer than `beyond`
    /// (if given) count. `hold` protects it from eviction.
    pub(super) fn longest(
        &self,
        chain: ChainId,
        tokens: &[u32],
        beyond: Option<usize>,
        usable: impl Fn(&[u32], u32) -> bool,
        hold: bool,
    ) -> Option<Found> {
        let mut slots = self.slots();
        let mut best: Option<Found> = None;
        for &slot in slots.by_chain.get(&chain)? {
            let Some(snapshot) = &slots.snapshots[slot as usize] else {
                continue;
            };
            let tail = &snapshot.tail;
            let longer = best.is_none_or(|best| tail.len() > best.tail)
                && beyond.is_none_or(|beyond| tail.len() > beyond);
            if longer
                && tokens.starts_with(tail)
                && snapshot.tail_block.is_none_or(|block| usable(tail, block))
            {
                best = Some(Found {
                    slot,
                    tail: tail.len(),
                    tail_block: snapshot.tail_block,
                });
            }
        }
        let found = best?;
        if hold {
            slots.retain(found.slot);
            slots.stats.hits += 1;
        }
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: fn(&[u32], u32) -> bool = |_, _| true;

    #[test]
    fn the_longest_tail_that_fits_is_found_and_held() {
        let pool = StatePool::new(4, 100);
        for tail in [&[1_u32, 2][..], &[1, 2, 3], &[1, 9], &[]] {
            let slot = pool.take().unwrap();
            assert!(pool.publish(slot, 7, tail, (!tail.is_empty()).then_some(5), None));
            pool.release(slot);
        }
        let find = |tokens: &[u32], beyond| {
            let found = pool.longest(7, tokens, beyond, ALL, false);
            found.map(|found| found.tail)
        };
        assert_eq!(find(&[1, 2, 3, 4], None), Some(3));
        assert_eq!(find(&[1, 2, 4], None), Some(2));
        assert_eq!(find(&[2], None), Some(0));
        assert_eq!(find(&[1, 2, 4], Some(2)), None);
        assert_eq!(
            pool.longest(8, &[1, 2], None, ALL, false).map(|f| f.tail),
            None
        );
        let unusable = pool.longest(7, &[1, 2, 3], None, |tail, _| tail.len() < 3, false);
        assert_eq!(unusable.map(|found| found.tail), Some(2));
        let held = pool.longest(7, &[1, 2, 3], None, ALL, true).unwrap();
        let taken: Vec<u32> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken.len(), 3);
        assert!(!taken.contains(&held.slot));
        assert_eq!(
            pool.counts(),
            StateCounts {
                free: 0,
                owned: 3,
                snapshots: 1
            }
        );
        assert!(pool.take_back(held.slot));
        assert_eq!(find(&[1, 2, 3], None), None);
    }

    #[test]
    fn a_second_snapshot_of_the_same_tokens_is_refused_and_the_least_used_one_is_evicted() {
        let pool = StatePool::new(2, 100);
        let (first, second) = (pool.take().unwrap(), pool.take().unwrap());
        assert!(pool.publish(first, 1, &[4], Some(0), None));
        assert!(!pool.publish(second, 1, &[4], Some(1), None));
        assert!(pool.publish(second, 2, &[4], Some(1), None));
        pool.release(first);
        pool.release(second);
        assert_eq!(
            pool.longest(1, &[4], None, ALL, false).unwrap().tail_block,
            Some(1)
        );
        let held = pool.longest(1, &[4], None, ALL, true).unwrap();
        pool.release(held.slot);
        assert_eq!(pool.take(), Some(second));
        assert!(pool.longest(2, &[4], None, ALL, false).is_none());
        assert_eq!(
            pool.stats(),
            StateStats {
                taken: 2,
                hits: 1,
                evictions: 1
            }
        );
    }
}
