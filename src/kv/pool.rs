//! The block pool and the prefix cache over it.
//!
//! A block is free, owned (referenced by one or more [`super::BlockTable`]s), or cached (referenced by none, its tokens known,
//! evictable). A cached or owned full block has a chain id, and its children name that id as their parent, so a chain of hits
//! compares every token of the prefix exactly once and never trusts a hash alone.
//!
//! The block that a finished sequence has only partly filled, its tail, is cached too: one per chain. A sequence that continues with
//! all of its tokens takes it over and writes into it, so it is never shared.
//!
//! A table releases its last block first, so in the LRU order a child always comes before its parent and is evicted before it. So no
//! cached block is ever unreachable.

use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::chain::{ChainId, Owner};
use super::shelves::{Shelves, key_of, tail_key};
use super::state::StatePool;
use super::window_blocks::WindowBlocks;

/// How many blocks are in which state; `free + owned + cached` is the pool's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Free.
    pub free: usize,
    /// Referenced by at least one table.
    pub owned: usize,
    /// Known tokens, referenced by no table; evictable.
    pub cached: usize,
}

/// A fixed number of KV blocks with a prefix cache. It has one lock, which is held for a few instructions at a time.
#[derive(Debug)]
pub struct BlockPool {
    block_size: usize,
    num_blocks: usize,
    prefix_cache: bool,
    /// Whether tenants share one prefix cache.
    shared: bool,
    /// Only for models with recurrent layers.
    states: Option<StatePool>,
    /// For models with layers that have a sliding window: the size of the widest one in tokens.
    pub(super) window: Option<usize>,
    shelves: Mutex<Shelves>,
}

impl BlockPool {
    /// A pool of `num_blocks` blocks of `block_size` tokens each.
    pub fn new(num_blocks: usize, block_size: usize, prefix_cache: bool) -> Self {
        Self {
            block_size,
            num_blocks,
            prefix_cache,
            shared: false,
            states: None,
            window: None,
            shelves: Mutex::new(Shelves::new(num_blocks, block_size)),
        }
    }

    /// The pool with one prefix cache for all tenants. Timing can then leak other tenants' prompts.
    #[must_use]
    pub fn shared_by_tenants(mut self) -> Self {
        self.shared = true;
        self
    }

    /// The pool of a model with recurrent layers, with slots for this many states. A snapshot is taken at each multiple of `every` tokens.
    /// A prefix is then known as far as there are both its blocks and a snapshot.
    #[must_use]
    pub fn with_states(mut self, slots: usize, every: usize) -> Self {
        self.states = (slots > 0).then(|| StatePool::new(slots, every.max(1)));
        self
    }

    /// The states of a model with recurrent layers.
    pub const fn states(&self) -> Option<&StatePool> {
        self.states.as_ref()
    }

    pub(super) fn shelves(&self) -> MutexGuard<'_, Shelves> {
        // Every critical section leaves the shelves consistent before anything that could panic.
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tokens per block.
    pub const fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in all.
    pub const fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Whether full blocks are found again by their tokens.
    pub const fn has_prefix_cache(&self) -> bool {
        self.prefix_cache
    }

    /// Number of available blocks: free ones, and cached ones that can be evicted.
    pub fn available(&self) -> usize {
        self.shelves().available()
    }

    /// Number of blocks by state.
    pub fn counts(&self) -> Counts {
        let shelves = self.shelves();
        let free = shelves.free.len();
        let cached = shelves.available() - free;
        Counts {
            free,
            owned: self.num_blocks - free - cached,
            cached,
        }
    }

    /// Number of cached blocks evicted since the start.
    pub fn evictions(&self) -> u64 {
        self.shelves().evictions
    }

    /// Number of tables that reference each block.
    pub fn references(&self) -> Vec<u32> {
        self.shelves().references.clone()
    }

    /// Number of a table's blocks that other tables share: those of a common prefix, which come first.
    pub(crate) fn shared(&self, blocks: &[u32]) -> usize {
        let shelves = self.shelves();
        blocks.partition_point(|&block| shelves.references[block as usize] > 1)
    }

    /// Removes blocks that tables reference from the prefix cache.
    pub(super) fn forget(&self, blocks: &[u32]) {
        let mut shelves = self.shelves();
        for &block in blocks {
            shelves.forget(block);
        }
    }

    /// Forgets the contents of all blocks and states, because the model has lost its memory. Blocks that tables reference become
    /// free when the tables release them.
    pub fn forget_all(&self) {
        let mut shelves = self.shelves();
        for block in 0..self.num_blocks as u32 {
            if shelves.cached[block as usize].is_none() {
                continue;
            }
            let unowned = shelves.references[block as usize] == 0;
            if unowned {
                shelves.unlist(block);
            }
            shelves.forget(block);
            if unowned {
                shelves.set_free(block);
            }
        }
        if let Some(contents) = &mut shelves.contents {
            contents.evicted.clear();
            contents.evicted_tails.clear();
        }
        drop(shelves);
        if let Some(states) = self.states() {
            states.forget_all();
        }
    }

    /// Whether one owner can find the other's cached blocks.
    pub fn shares(&self, owner: impl Into<Owner>, other: impl Into<Owner>) -> bool {
        self.prefix_cache && self.root(owner) == self.root(other)
    }

    pub(super) fn root(&self, owner: impl Into<Owner>) -> ChainId {
        owner.into().root(self.shared)
    }

    /// Appends `count` new blocks to `blocks`, each with its window block, or none at all.
    pub(super) fn allocate(&self, count: usize, blocks: &mut Vec<u32>) -> bool {
        let mut shelves = self.shelves();
        let windows = shelves.windows.as_ref().map(WindowBlocks::available);
        if shelves.available().min(windows.unwrap_or(count)) < count {
            return false;
        }
        for _ in 0..count {
            match shelves.take() {
                Some(block) => blocks.push(block),
                None => unreachable!("counted as available under the same lock"),
            }
        }
        true
    }

    /// Appends the cached blocks of the longest known prefix of `tokens`, and returns the chain of the last block. `tokens` follow
    /// those of `chain`. `held` is the number of blocks before them, and the first of those that has a window block. The caller
    /// holds the blocks, and the window blocks that the next token sees.
    pub(super) fn match_chain(
        &self,
        chain: ChainId,
        tokens: &[u32],
        held: (usize, usize),
        blocks: &mut Vec<u32>,
    ) -> ChainId {
        if !self.prefix_cache {
            return chain;
        }
        let mut shelves = self.shelves();
        let path = shelves.known_path(chain, tokens, held);
        let reached = (held.0 + path.len()) * self.block_size;
        for (at, &(block, _)) in path.iter().enumerate() {
            shelves.retain(block);
            if let Some(windows) = &mut shelves.windows
                && held.0 + at >= windows.first_seen(reached)
            {
                windows.hold(block);
            }
            blocks.push(block);
        }
        path.last().map_or(chain, |&(_, chain)| chain)
    }

    /// How many leading tokens of `tokens` are cached now.
    pub fn cached_prefix(&self, owner: impl Into<Owner>, tokens: &[u32]) -> usize {
        let owner = owner.into();
        if self.states.is_some() {
            return self.count_known(owner, tokens);
        }
        let root = self.root(owner);
        let shelves = self.shelves();
        let mut count = 0;
        if self.prefix_cache {
            let path = shelves.known_path(root, tokens, (0, 0));
            count = path.len() * self.block_size;
            let chain = path.last().map_or(root, |&(_, chain)| chain);
            let tail = shelves.find_tail(chain, &tokens[count..]);
            count += tail.map_or(0, |(_, len)| len);
        }
        count
    }

    /// Removes the tail of `parent` from the cache, if `tokens` begin with it. Returns its block and its number of tokens.
    pub(super) fn take_tail(&self, parent: ChainId, tokens: &[u32]) -> Option<(u32, usize)> {
        let mut shelves = self.shelves();
        let (block, len) = shelves.find_tail(parent, tokens)?;
        shelves.forget(block);
        shelves.retain(block);
        if let Some(windows) = &mut shelves.windows {
            windows.hold(block);
        }
        Some((block, len))
    }

    /// Makes a partly full block the tail of `parent`, in place of an earlier tail. Its first `tokens` are computed. It can be
    /// taken once its owner has released it.
    pub(super) fn register_tail(&self, block: u32, parent: ChainId, tokens: &[u32]) {
        if !self.prefix_cache || tokens.is_empty() {
            return;
        }
        let mut shelves = self.shelves();
        let key = tail_key(parent);
        if let Some(&other) = shelves.index.get(&key) {
            if shelves.cached[other as usize].is_none_or(|cached| cached.chain.is_some()) {
                return;
            }
            shelves.forget(other);
            if shelves.references[other as usize] == 0 {
                shelves.unlist(other);
                shelves.set_free(other);
            }
        }
        shelves.index.insert(key, block);
        shelves.note(block, Some(key), (parent, None), tokens);
    }

    /// Records the tokens of a partly full block that come after those of `parent`, for a snapshot after them.
    pub(super) fn note_tail(&self, block: u32, parent: ChainId, tokens: &[u32]) {
        let mut shelves = self.shelves();
        shelves.forget(block);
        shelves.note(block, None, (parent, None), tokens);
    }

    /// Adds a computed full block to the index under `parent`. If the same tokens are cached already, that block is used instead of
    /// `block`, which is released. `before` is the chain's last block, if it has one. Returns the block to keep and its chain.
    pub(super) fn register(
        &self,
        block: u32,
        (parent, before): (ChainId, Option<u32>),
        tokens: &[u32],
    ) -> (u32, ChainId) {
        if !self.prefix_cache {
            return (block, parent);
        }
        let mut shelves = self.shelves();
        if let Some((other, chain)) = shelves.find(parent, tokens) {
            if other != block {
                shelves.retain(other);
                if let Some(windows) = &mut shelves.windows {
                    windows.replace(block, other);
                }
                shelves.release(block);
            }
            return (other, chain);
        }
        let key = key_of(parent, tokens);
        let chain = shelves.next_chain;
        shelves.next_chain += 1;
        if let Some(contents) = &mut shelves.contents {
            contents.name(block, (parent, before), tokens);
        }
        // Two chains have the same 64-bit key: the newer one gets no entry, which only costs a recomputation.
        if let Entry::Vacant(entry) = shelves.index.entry(key) {
            entry.insert(block);
            shelves.note(block, Some(key), (parent, Some(chain)), tokens);
        }
        (block, chain)
    }

    /// Releases one reference to each block, the last block first.
    pub(super) fn release(&self, blocks: &[u32]) {
        let mut shelves = self.shelves();
        for &block in blocks.iter().rev() {
            shelves.release(block);
        }
    }
}
