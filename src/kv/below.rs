//! The pool's contents by the keys under which the tiers below know them: which may be copied there, and which were evicted.

use std::collections::HashMap;

use super::chain::{ChainId, Owner};
use super::contents::{Contents, Place};
use super::pool::BlockPool;
use super::shelves::Shelves;
use super::state::NamedState;
use super::table::BlockTable;
use crate::tier::{Digest, Key};

impl Shelves {
    /// Notes the content of an evicted block, for the tiers below.
    pub(super) fn note_evicted(&mut self, block: u32) {
        let at = block as usize;
        let Some(contents) = &mut self.contents else {
            return;
        };
        let digest = contents.digests[at].take();
        if contents.loading.contains(&block) {
            return;
        }
        if let Some(digest) = digest {
            contents
                .evicted
                .push((digest.block_key(), Place::Block(block)));
        } else if let Some(cached) = self.cached[at].filter(|cached| cached.chain.is_none()) {
            let size = self.tokens.len() / self.cached.len();
            let tokens = self.tokens[at * size..at * size + cached.len].to_vec();
            contents.evicted_tails.push((block, cached.parent, tokens));
        }
    }

    fn is_loading(&self, block: u32) -> bool {
        let contents = self.contents.as_ref();
        contents.is_some_and(|contents| contents.loading.contains(&block))
    }

    /// The place of a snapshot, if the block with its tail still has the tail.
    fn place_of(&self, state: &NamedState) -> Option<Place> {
        let whole = state.tail_block.is_none_or(|block| {
            self.holds(block, state.chain, &state.tail) && !self.is_loading(block)
        });
        whole.then_some(Place::State {
            slot: state.slot,
            tail_block: state.tail_block,
        })
    }
}

impl BlockPool {
    /// The pool with keys for its contents. `roots` has the beginning of each tenant's keys. Contents of other tenants have no keys
    /// and are never copied. If tenants share one prefix cache, the root is tenant 0's.
    #[must_use]
    pub fn with_names(self, roots: HashMap<u32, Digest>) -> Self {
        let roots = roots.into_iter();
        self.shelves().contents = Some(Contents {
            roots: roots.map(|(tenant, root)| (tenant.into(), root)).collect(),
            digests: vec![None; self.num_blocks()],
            loading: Vec::new(),
            evicted: Vec::new(),
            evicted_tails: Vec::new(),
        });
        self
    }

    /// The key of the state after `tail`, and `tail`. The tail follows the tokens of `chain`, whose last block is `last`.
    pub(super) fn state_key(&self, chain: ChainId, last: Option<u32>, tail: &[u32]) -> Option<Key> {
        let shelves = self.shelves();
        let digest = shelves.contents.as_ref()?.behind(chain, last)?;
        Some(digest.state_key(tail))
    }

    /// The digests of the prefixes of `tokens` that are cached here: of no block, the first block, the first two, and so on. Empty
    /// if contents have no keys.
    pub fn named_prefixes(&self, owner: impl Into<Owner>, tokens: &[u32]) -> Vec<Digest> {
        let mut chain = self.root(owner);
        let shelves = self.shelves();
        let contents = shelves.contents.as_ref();
        let Some((contents, root)) = contents.and_then(|c| Some((c, c.behind(chain, None)?)))
        else {
            return Vec::new();
        };
        let mut digests = vec![root];
        if self.has_prefix_cache() {
            for chunk in tokens.chunks_exact(self.block_size()) {
                let Some((block, next)) = shelves.find(chain, chunk) else {
                    break;
                };
                let Some(digest) = contents.digests[block as usize] else {
                    break;
                };
                digests.push(digest);
                chain = next;
            }
        }
        digests
    }

    /// Notes that a block gets its content from below before the next step.
    pub(super) fn note_loading(&self, block: u32) {
        if let Some(contents) = &mut self.shelves().contents {
            contents.loading.push(block);
        }
    }

    /// Notes that everything has been loaded.
    pub fn note_loaded(&self) {
        if let Some(contents) = &mut self.shelves().contents {
            contents.loading.clear();
        }
        if let Some(states) = self.states() {
            states.note_loaded();
        }
    }

    /// The contents that were evicted since the last call. Each remains at its place until the next step.
    pub fn take_evicted(&self) -> Vec<(Key, Place)> {
        let mut shelves = self.shelves();
        let Some(contents) = &mut shelves.contents else {
            return Vec::new();
        };
        let mut evicted = std::mem::take(&mut contents.evicted);
        let tails = std::mem::take(&mut contents.evicted_tails);
        let Some(states) = self.states() else {
            return evicted;
        };
        for state in states.take_evicted() {
            if let Some(place) = shelves.place_of(&state) {
                evicted.push((state.key, place));
            }
        }
        // A snapshot is useless without its tail.
        for (block, parent, tokens) in tails {
            let states = states.named_on(block).into_iter();
            let whole = states.filter(|s| s.chain == parent && tokens.starts_with(&s.tail));
            evicted.extend(whole.map(|state| {
                let (slot, tail_block) = (state.slot, Some(block));
                (state.key, Place::State { slot, tail_block })
            }));
        }
        evicted
    }

    /// Whether a content is still at its place.
    pub fn lies_at(&self, key: &Key, place: Place) -> bool {
        let shelves = self.shelves();
        match place {
            Place::Block(block) => {
                let contents = shelves.contents.as_ref();
                let digest = contents.and_then(|contents| contents.digests[block as usize]);
                digest.is_some_and(|digest| digest.block_key() == *key)
                    && !shelves.is_loading(block)
            }
            Place::State { slot, .. } => {
                let named = self.states().and_then(|states| states.named(slot));
                named.is_some_and(|state| {
                    state.key == *key && shelves.place_of(&state) == Some(place)
                })
            }
        }
    }

    /// Removes a content that could not be loaded from the prefix cache.
    pub fn forget_place(&self, place: Place) {
        let (slot, block) = match place {
            Place::Block(block) => (None, Some(block)),
            Place::State { slot, tail_block } => (Some(slot), tail_block),
        };
        let mut shelves = self.shelves();
        if let Some(block) = block {
            let unowned = shelves.references[block as usize] == 0;
            if unowned && shelves.cached[block as usize].is_some() {
                shelves.unlist(block);
                shelves.set_free(block);
            }
            shelves.forget(block);
        }
        if let (Some(slot), Some(states)) = (slot, self.states()) {
            states.forget(slot);
        }
    }
}

impl BlockTable {
    /// The contents that the tiers below may keep: its blocks in the prefix cache, in order, and its newest snapshot.
    pub fn contents(&self) -> Vec<(Key, Place)> {
        let pool = self.pool();
        let shelves = pool.shelves();
        let Some(contents) = &shelves.contents else {
            return Vec::new();
        };
        let named = |&block: &u32| {
            let digest = contents.digests[block as usize]?;
            Some((digest.block_key(), Place::Block(block)))
        };
        let mut found: Vec<_> = self.registered_blocks().iter().filter_map(named).collect();
        let slot = self.state.as_ref().and_then(|state| state.from);
        if let (Some(slot), Some(states)) = (slot, pool.states())
            && let Some(state) = states.named(slot)
            && let Some(place) = shelves.place_of(&state)
        {
            found.push((state.key, place));
        }
        found
    }
}
