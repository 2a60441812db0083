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

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::chain::{ChainId, FIRST_CHAIN, Owner};
use super::contents::Contents;
use super::lru::LruList;
use super::state::StatePool;
use super::window_blocks::WindowBlocks;

#[derive(Debug, Clone, Copy)]
pub(super) struct Cached {
    /// Where the index has it. A tail that belongs to a snapshot is found through the snapshot.
    key: Option<u64>,
    pub(super) parent: ChainId,
    /// Chain of a full block; a tail has none.
    pub(super) chain: Option<ChainId>,
    /// Number of tokens whose K and V it has.
    pub(super) len: usize,
}

#[derive(Debug)]
pub(super) struct Shelves {
    pub(super) references: Vec<u32>,
    pub(super) free: Vec<u32>,
    pub(super) cached: Vec<Option<Cached>>,
    /// `block_size` token ids per block, valid where `cached` is set.
    pub(super) tokens: Vec<u32>,
    pub(super) index: HashMap<u64, u32>,
    pub(super) evictable: LruList,
    /// Held blocks: evictable, but only after all others, because a client has said that they will be needed.
    pub(super) held: LruList,
    /// Until when each block is held, in milliseconds. Earlier blocks of its chain are held at least as long.
    pub(super) hold_until: Vec<u64>,
    pub(super) in_held: Vec<bool>,
    /// The time that was passed in last.
    pub(super) now_ms: u64,
    next_chain: ChainId,
    evictions: u64,
    /// Only for models with layers that see only a window of the last tokens.
    pub(super) windows: Option<WindowBlocks>,
    /// Where there are tiers below.
    pub(super) contents: Option<Contents>,
}

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
    /// Of models with layers that see a window: how many tokens the widest has.
    pub(super) window: Option<usize>,
    shelves: Mutex<Shelves>,
}

fn key_of(parent: ChainId, tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parent.hash(&mut hasher);
    tokens.hash(&mut hasher);
    hasher.finish()
}

/// Where the tail of a chain is found.
pub(super) fn tail_key(parent: ChainId) -> u64 {
    key_of(parent, &[])
}

impl Shelves {
    pub(super) fn find(
        &self,
        parent: ChainId,
        tokens: &[u32],
        block_size: usize,
    ) -> Option<(u32, ChainId)> {
        let block = *self.index.get(&key_of(parent, tokens))?;
        let cached = self.cached[block as usize]?;
        let at = block as usize * block_size;
        let found = cached.parent == parent && self.tokens[at..at + block_size] == *tokens;
        Some((block, cached.chain.filter(|_| found)?))
    }

    /// The tail of `parent`, with the number of its tokens, if `tokens` begin with all of them and no sequence owns it.
    fn find_tail(
        &self,
        parent: ChainId,
        tokens: &[u32],
        block_size: usize,
    ) -> Option<(u32, usize)> {
        let block = *self.index.get(&tail_key(parent))?;
        let cached = self.cached[block as usize]?;
        let at = block as usize * block_size;
        let found = cached.parent == parent
            && cached.chain.is_none()
            && self.references[block as usize] == 0
            && self
                .windows
                .as_ref()
                .is_none_or(|windows| windows.has(block))
            && tokens.starts_with(&self.tokens[at..at + cached.len]);
        found.then_some((block, cached.len))
    }

    /// Whether a block has `tokens` after those of `parent`, and possibly more after them.
    pub(super) fn holds(
        &self,
        block: u32,
        parent: ChainId,
        tokens: &[u32],
        block_size: usize,
    ) -> bool {
        let at = block as usize * block_size;
        self.cached[block as usize].is_some_and(|cached| {
            cached.parent == parent
                && cached.len >= tokens.len()
                && self.tokens[at..at + tokens.len()] == *tokens
        })
    }

    /// Removes the block from the index.
    pub(super) fn forget(&mut self, block: u32) {
        if let Some(key) = self.cached[block as usize]
            .take()
            .and_then(|cached| cached.key)
        {
            self.index.remove(&key);
        }
        if let Some(contents) = &mut self.contents {
            contents.forget(block);
        }
    }

    pub(super) fn retain(&mut self, block: u32) {
        if self.references[block as usize] == 0 {
            self.unlist(block);
        }
        self.references[block as usize] += 1;
    }

    fn release(&mut self, block: u32) {
        let count = &mut self.references[block as usize];
        *count -= 1;
        if *count == 0 {
            if self.cached[block as usize].is_some() {
                self.list(block);
            } else {
                self.set_free(block);
            }
        }
    }

    const fn available(&self) -> usize {
        self.free.len() + self.evictable.len() + self.held.len()
    }

    fn take(&mut self) -> Option<u32> {
        let block = if let Some(block) = self.free.pop() {
            block
        } else {
            let block = self.next_to_evict()?;
            self.unlist(block);
            self.note_evicted(block);
            self.forget(block);
            self.evictions += 1;
            if let Some(windows) = &mut self.windows {
                windows.discard(block);
            }
            block
        };
        self.references[block as usize] = 1;
        self.hold_until[block as usize] = 0;
        if let Some(windows) = &mut self.windows {
            windows.take(block);
        }
        Some(block)
    }
}

impl BlockPool {
    /// A pool of `num_blocks` blocks of `block_size` tokens each.
    pub fn new(num_blocks: usize, block_size: usize, prefix_cache: bool) -> Self {
        let shelves = Shelves {
            references: vec![0; num_blocks],
            free: (0..num_blocks as u32).rev().collect(),
            cached: vec![None; num_blocks],
            tokens: vec![0; num_blocks * block_size],
            index: HashMap::new(),
            evictable: LruList::new(num_blocks),
            held: LruList::new(num_blocks),
            hold_until: vec![0; num_blocks],
            in_held: vec![false; num_blocks],
            now_ms: 0,
            next_chain: FIRST_CHAIN,
            evictions: 0,
            windows: None,
            contents: None,
        };
        Self {
            block_size,
            num_blocks,
            prefix_cache,
            shared: false,
            states: None,
            window: None,
            shelves: Mutex::new(shelves),
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

    /// Forgets what every block and state holds, because the model has lost it. What a table references becomes free with it.
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

    /// Whether one owner can find what the other has cached.
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

    /// Appends the cached blocks of the longest known prefix of `tokens`, which follow those of `chain`, and returns the last one's
    /// chain. `held`: how many blocks come before, and the first of them with a window block. The blocks are held for the caller, and
    /// those of their window blocks that the next token sees.
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
        let path = shelves.known_path(chain, tokens, self.block_size, held);
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
            let path = shelves.known_path(root, tokens, self.block_size, (0, 0));
            count = path.len() * self.block_size;
            let chain = path.last().map_or(root, |&(_, chain)| chain);
            let tail = shelves.find_tail(chain, &tokens[count..], self.block_size);
            count += tail.map_or(0, |(_, len)| len);
        }
        count
    }

    /// Removes the tail of `parent` from the cache, if it has one with which `tokens` begin. Returns the block and its number of tokens.
    pub(super) fn take_tail(&self, parent: ChainId, tokens: &[u32]) -> Option<(u32, usize)> {
        let mut shelves = self.shelves();
        let (block, len) = shelves.find_tail(parent, tokens, self.block_size)?;
        shelves.forget(block);
        shelves.retain(block);
        if let Some(windows) = &mut shelves.windows {
            windows.hold(block);
        }
        Some((block, len))
    }

    /// Makes a block of which `tokens` have been computed the tail of `parent`, instead of any earlier one. It can be taken once its owner
    /// has released it.
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
        let (chain, len) = (None, tokens.len());
        shelves.cached[block as usize] = Some(Cached {
            key: Some(key),
            parent,
            chain,
            len,
        });
        let at = block as usize * self.block_size;
        shelves.tokens[at..at + len].copy_from_slice(tokens);
    }

    /// Records the tokens of a partly full block that come after those of `parent`, for a snapshot after them.
    pub(super) fn note_tail(&self, block: u32, parent: ChainId, tokens: &[u32]) {
        let mut shelves = self.shelves();
        shelves.forget(block);
        shelves.cached[block as usize] = Some(Cached {
            key: None,
            parent,
            chain: None,
            len: tokens.len(),
        });
        let at = block as usize * self.block_size;
        shelves.tokens[at..at + tokens.len()].copy_from_slice(tokens);
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
        if let Some((other, chain)) = shelves.find(parent, tokens, self.block_size) {
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
            let (chain, len) = (Some(chain), tokens.len());
            shelves.cached[block as usize] = Some(Cached {
                key: Some(key),
                parent,
                chain,
                len,
            });
            let at = block as usize * self.block_size;
            shelves.tokens[at..at + self.block_size].copy_from_slice(tokens);
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
