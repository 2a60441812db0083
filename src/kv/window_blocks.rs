//! The second group of blocks of a model in which some layers see only a window of the last tokens.
//!
//! A block of the pool has its tokens' keys and values of the layers that see everything. Those of the layers with a window are in a
//! separate *window block*, which is released once its tokens are out of every window. So a prefix can be continued where its blocks
//! are known and the last of them, as far as the window reaches, still have their window blocks.
//!
//! A window block that no table holds keeps its tokens until another one is needed. Those in the middle of a sequence are evicted
//! first: sequences continue at the end of another one, or at a border that a request names.

use std::sync::Arc;

use super::lru::LruList;

#[derive(Debug)]
pub(super) struct WindowBlocks {
    /// Tokens that a token sees, itself included: those of the widest window.
    pub(super) window: usize,
    block_size: usize,
    /// The window block of each block, if it has one.
    pub(super) of_block: Vec<Option<u32>>,
    /// The block that each window block belongs to.
    owner: Vec<u32>,
    pub(super) references: Vec<u32>,
    free: Vec<u32>,
    /// Evictable: those in the middle of a sequence, and those at an end of one.
    passed: LruList,
    ends: LruList,
    is_end: Vec<bool>,
    evictions: u64,
}

/// How many window blocks are in which state; together they are all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WindowCounts {
    /// Hold nothing.
    pub free: usize,
    /// Held by at least one table.
    pub owned: usize,
    /// Hold known tokens, held by no table; evictable.
    pub cached: usize,
    /// Those given up for new ones since the start.
    pub evictions: u64,
}

/// The first block that the token after `tokens` tokens, and the other tokens of its block, see in a window of `window` tokens.
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

    /// Gives a block that has none a window block, held once. Some must be available.
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

    /// Gives up one reference; `is_end`: somebody may go on from here.
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

    /// The block's tokens are no longer known, and no table holds it.
    pub(super) fn discard(&mut self, block: u32) {
        if let Some(own) = self.of_block[block as usize].take() {
            self.list_of(own).remove(own);
            self.free.push(own);
        }
    }

    /// A table holds `other`, of the same tokens, in place of `block`.
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
    /// The first of the table's blocks whose window block it holds; it holds those of all behind it.
    pub first: usize,
    /// Their ids, in order; shared with the step that reads them.
    pub blocks: Arc<Vec<u32>>,
}
