//! The state of each block, and the index that finds cached blocks by their tokens.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::chain::{ChainId, FIRST_CHAIN};
use super::contents::Contents;
use super::lru::LruList;
use super::window_blocks::WindowBlocks;

/// The known content of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cached {
    /// Its entry in the index. The tail of a snapshot has none: it is found through the snapshot.
    pub(super) key: Option<u64>,
    pub(super) parent: ChainId,
    /// Chain of a full block; a tail has none.
    pub(super) chain: Option<ChainId>,
    /// Number of tokens whose K and V it has.
    pub(super) len: usize,
}

/// Everything that the pool's lock guards.
#[derive(Debug)]
pub(super) struct Shelves {
    pub(super) block_size: usize,
    pub(super) references: Vec<u32>,
    pub(super) free: Vec<u32>,
    pub(super) cached: Vec<Option<Cached>>,
    /// `block_size` token ids per block, valid where `cached` is set.
    pub(super) tokens: Vec<u32>,
    pub(super) index: HashMap<u64, u32>,
    pub(super) evictable: LruList,
    /// Held blocks: evictable, but only after all others, because a client has said that they will be needed.
    pub(super) held: LruList,
    /// The time until which each block is held, in milliseconds. Earlier blocks of its chain are held at least as long.
    pub(super) hold_until: Vec<u64>,
    pub(super) in_held: Vec<bool>,
    /// The time of the last call of `set_time`.
    pub(super) now_ms: u64,
    pub(super) next_chain: ChainId,
    pub(super) evictions: u64,
    /// Only for models with layers that have a sliding window.
    pub(super) windows: Option<WindowBlocks>,
    /// Only if there are tiers below.
    pub(super) contents: Option<Contents>,
}

pub(super) fn key_of(parent: ChainId, tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parent.hash(&mut hasher);
    tokens.hash(&mut hasher);
    hasher.finish()
}

/// The index entry of a chain's tail.
pub(super) fn tail_key(parent: ChainId) -> u64 {
    key_of(parent, &[])
}

impl Shelves {
    pub(super) fn new(num_blocks: usize, block_size: usize) -> Self {
        Self {
            block_size,
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
        }
    }

    pub(super) fn find(&self, parent: ChainId, tokens: &[u32]) -> Option<(u32, ChainId)> {
        let block = *self.index.get(&key_of(parent, tokens))?;
        let cached = self.cached[block as usize]?;
        let at = block as usize * self.block_size;
        let found = cached.parent == parent && self.tokens[at..at + self.block_size] == *tokens;
        Some((block, cached.chain.filter(|_| found)?))
    }

    /// The tail of `parent` and its number of tokens, if `tokens` begin with the whole tail and no sequence owns it.
    pub(super) fn find_tail(&self, parent: ChainId, tokens: &[u32]) -> Option<(u32, usize)> {
        let block = *self.index.get(&tail_key(parent))?;
        let cached = self.cached[block as usize]?;
        let at = block as usize * self.block_size;
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

    /// Whether a block has `tokens` after those of `parent`. It may have more.
    pub(super) fn holds(&self, block: u32, parent: ChainId, tokens: &[u32]) -> bool {
        let at = block as usize * self.block_size;
        self.cached[block as usize].is_some_and(|cached| {
            cached.parent == parent
                && cached.len >= tokens.len()
                && self.tokens[at..at + tokens.len()] == *tokens
        })
    }

    /// Records the tokens of a block, which follow those of `parent`. `chain`: its own, if it is full.
    pub(super) fn note(
        &mut self,
        block: u32,
        key: Option<u64>,
        (parent, chain): (ChainId, Option<ChainId>),
        tokens: &[u32],
    ) {
        let len = tokens.len();
        self.cached[block as usize] = Some(Cached {
            key,
            parent,
            chain,
            len,
        });
        let at = block as usize * self.block_size;
        self.tokens[at..at + len].copy_from_slice(tokens);
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

    pub(super) fn release(&mut self, block: u32) {
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

    pub(super) const fn available(&self) -> usize {
        self.free.len() + self.evictable.len() + self.held.len()
    }

    pub(super) fn take(&mut self) -> Option<u32> {
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
