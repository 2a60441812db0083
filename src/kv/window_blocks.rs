//! The second group of blocks, for a model in which some layers have a sliding window.
//!
//! A block of the pool has the keys and values of its tokens in the layers that see everything. Those of the layers with a window
//! are in a separate *window block*, which is released once its tokens are out of every window. So a sequence can continue a prefix
//! if its blocks are known, and the last of them, as far as the window reaches, still have their window blocks.
//!
//! A window block that no table holds keeps its tokens until another one is needed. Those in the middle of a sequence are evicted
//! first, because sequences continue at the end of another one, or at a border that a request names.

use std::sync::Arc;

use super::lru::LruList;

#[derive(Debug)]
pub(super) struct WindowBlocks {
    /// Number of tokens that a token sees, including itself, in the widest window.
    pub(super) window: usize,
    block_size: usize,
    /// The window block of each block, if it has one.
    pub(super) of_block: Vec<Option<u32>>,
    /// The block that each window block belongs to.
    owner: Vec<u32>,
    pub(super) references: Vec<u32>,
    free: Vec<u32>,
    /// Evictable window blocks: those in the middle of a sequence, and those at an end.
    passed: LruList,
    ends: LruList,
    is_end: Vec<bool>,
    evictions: u64,
}

/// Number of window blocks by state; the sum is the pool's size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WindowCounts {
    /// Hold nothing.
    pub free: usize,
    /// Held by at least one table.
    pub owned: usize,
    /// Hold known tokens, held by no table; evictable.
    pub cached: usize,
    /// Number of evictions since the start.
    pub evictions: u64,
}

/// The first block that the token after `tokens` tokens sees in a window of `window` tokens, and that the other tokens of its block
/// see.
pub(super) const fn first_seen(tokens: usize, window: usize, block_size: usize) -> usize {
    (tokens / block_size * block_size + 1).saturating_sub(window) / block_size
}

impl WindowBlocks {
    pub(super) fn new(window: usize, block_size: usize, num_blocks: usize, blocks: usize) -> Self {
        Self {
            window,
            block_size,
            of_block: vec![None; blocks],
            owner: vec![0; num_blocks],
            references: vec![0; num_blocks],
            free: (0..num_blocks as u32).rev().collect(),
            passed: LruList::new(num_blocks),
            ends: LruList::new(num_blocks),
            is_end: vec![false; num_blocks],
            evictions: 0,
        }
    }

    pub(super) const fn first_seen(&self, tokens: usize) -> usize {
        first_seen(tokens, self.window, self.block_size)
    }

    pub(super) const fn available(&self) -> usize {
        self.free.len() + self.passed.len() + self.ends.len()
    }

    pub(super) fn has(&self, block: u32) -> bool {
        self.of_block[block as usize].is_some()
    }

    fn list_of(&mut self, own: u32) -> &mut LruList {
        if self.is_end[own as usize] {
            &mut self.ends
        } else {
            &mut self.passed
        }
    }

    /// Gives a block a window block and holds it once. The block must have none, and one must be available.
    pub(super) fn take(&mut self, block: u32) {
        let own = self.free.pop().or_else(|| {
            let own = self.passed.front().or_else(|| self.ends.front())?;
            self.list_of(own).remove(own);
            self.of_block[self.owner[own as usize] as usize] = None;
            self.evictions += 1;
            Some(own)
        });
        let Some(own) = own else {
            unreachable!("counted as available under the same lock")
        };
        self.of_block[block as usize] = Some(own);
        self.owner[own as usize] = block;
        self.references[own as usize] = 1;
        self.is_end[own as usize] = false;
    }

    pub(super) fn hold(&mut self, block: u32) {
        let Some(own) = self.of_block[block as usize] else {
            return;
        };
        if self.references[own as usize] == 0 {
            self.list_of(own).remove(own);
        }
        self.references[own as usize] += 1;
    }

    /// Releases one reference. `is_end`: another sequence may continue from here.
    pub(super) fn let_go(&mut self, block: u32, is_end: bool) {
        let Some(own) = self.of_block[block as usize] else {
            return;
        };
        self.is_end[own as usize] |= is_end;
        let count = &mut self.references[own as usize];
        *count -= 1;
        if *count == 0 {
            self.list_of(own).push_back(own);
        }
    }

    /// Frees the window block of a block whose tokens are no longer known, and which no table holds.
    pub(super) fn discard(&mut self, block: u32) {
        if let Some(own) = self.of_block[block as usize].take() {
            self.list_of(own).remove(own);
            self.free.push(own);
        }
    }

    /// Makes a table hold `other` in place of `block`. Both have the same tokens.
    pub(super) fn replace(&mut self, block: u32, other: u32) {
        if self.has(other) {
            self.hold(other);
            self.let_go(block, false);
        } else if let Some(own) = self.of_block[block as usize].take() {
            self.of_block[other as usize] = Some(own);
            self.owner[own as usize] = other;
        }
    }

    pub(super) fn counts(&self) -> WindowCounts {
        let (free, cached) = (self.free.len(), self.passed.len() + self.ends.len());
        WindowCounts {
            free,
            owned: self.references.len() - free - cached,
            cached,
            evictions: self.evictions,
        }
    }
}

/// Window blocks of a table. Each is held once.
#[derive(Debug, Clone, Default)]
pub struct TableWindow {
    /// Index of the table's first block with a window block. All blocks after it have one.
    pub first: usize,
    /// Their ids, in order; shared with the step that reads them.
    pub blocks: Arc<Vec<u32>>,
}
