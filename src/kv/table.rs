//! The blocks and the recurrent state that one sequence owns. Dropping the table releases them.

use std::sync::Arc;

use super::chain::{ChainId, Owner};
use super::pool::BlockPool;
use super::slots::TableState;
use super::window_blocks::TableWindow;

/// Block ids of one sequence in order; entry `i` holds tokens `i * block_size .. (i + 1) * block_size`.
#[derive(Debug)]
pub struct BlockTable {
    pool: Arc<BlockPool>,
    /// Shared with the step that reads it, so that a step needs no copy. It changes only between steps.
    blocks: Arc<Vec<u32>>,
    /// Number of leading blocks that are in the prefix cache, and the chain of the last of them.
    registered: usize,
    chain: ChainId,
    /// Number of tokens that were cached when the table was created.
    known: usize,
    /// Only for models with recurrent layers.
    pub(super) state: Option<TableState>,
    /// Only for models with layers that have a sliding window.
    pub(super) window: Option<TableWindow>,
}

impl BlockTable {
    /// Creates a table with the cached blocks of the longest known prefix of `tokens`, which it shares with other tables, and with
    /// the state after them.
    pub fn from_prefix(pool: &Arc<BlockPool>, owner: impl Into<Owner>, tokens: &[u32]) -> Self {
        let mut table = Self {
            pool: Arc::clone(pool),
            registered: 0,
            blocks: Arc::default(),
            chain: pool.root(owner),
            known: 0,
            state: pool.states().map(|_| TableState::default()),
            window: pool.window.map(|_| TableWindow::default()),
        };
        if table.state.is_some() {
            table.known = table.adopt_state(tokens, 0);
        } else {
            let blocks = Arc::make_mut(&mut table.blocks);
            table.chain = pool.match_chain(table.chain, tokens, (0, 0), blocks);
            table.registered = table.blocks.len();
            table.known = table.capacity();
            table.hold_windows_from(pool.first_seen(table.known).unwrap_or(0));
        }
        table
    }

    /// Number of tokens that were cached when the table was created. For a model with recurrent layers, these end where its state
    /// is.
    pub const fn known(&self) -> usize {
        self.known
    }

    /// Block ids in order.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// A snapshot of the block ids that does not change with the table.
    pub fn snapshot(&self) -> Arc<Vec<u32>> {
        Arc::clone(&self.blocks)
    }

    /// Number of tokens for which the table has room.
    pub fn capacity(&self) -> usize {
        self.blocks.len() * self.pool.block_size()
    }

    /// Number of new blocks that room for `tokens` tokens would need.
    pub fn missing(&self, tokens: usize) -> usize {
        tokens
            .div_ceil(self.pool.block_size())
            .saturating_sub(self.blocks.len())
    }

    /// Makes room for `tokens` tokens in all and for their state. Returns false if the pool has not enough blocks or no slot.
    pub fn grow(&mut self, tokens: usize) -> bool {
        if !self.make_state_room() {
            return false;
        }
        let missing = self.missing(tokens);
        if missing == 0 {
            return true;
        }
        let found = self.pool.allocate(missing, Arc::make_mut(&mut self.blocks));
        self.renew_windows();
        found
    }

    /// Releases the blocks after those of the first `tokens` tokens. None of them may be in the prefix cache.
    pub fn truncate(&mut self, tokens: usize) {
        let kept = tokens.div_ceil(self.pool.block_size());
        if kept < self.blocks.len() {
            let given_up = Arc::make_mut(&mut self.blocks).split_off(kept);
            self.pool.let_windows_go(&given_up, kept, |_| false);
            self.pool.release(&given_up);
            self.renew_windows();
        }
    }

    /// Puts every full block of the first `computed` tokens into the prefix cache. All of them must have been computed.
    pub fn register(&mut self, tokens: &[u32], computed: usize) {
        let (size, mut replaced) = (self.pool.block_size(), false);
        while (self.registered + 1) * size <= computed {
            let at = self.registered;
            let before = at.checked_sub(1).map(|before| self.blocks[before]);
            let (block, chain) = self.pool.register(
                self.blocks[at],
                (self.chain, before),
                &tokens[at * size..(at + 1) * size],
            );
            if self.blocks[at] != block {
                Arc::make_mut(&mut self.blocks)[at] = block;
                replaced = true;
            }
            self.chain = chain;
            self.registered += 1;
        }
        if replaced {
            self.renew_windows();
        }
    }

    /// Removes its blocks from the prefix cache, so that no sequence finds them. Sequences that share them keep them.
    pub fn forget(&self) {
        self.pool.forget(&self.blocks[..self.registered]);
    }

    /// Takes the cached, partly full block whose tokens come next in `tokens`, if there is one. Call it before any block is added
    /// to those of the prefix. Returns the number of its tokens.
    pub fn take_tail(&mut self, tokens: &[u32]) -> usize {
        let rest = tokens.get(self.capacity()..).unwrap_or_default();
        let Some((block, len)) = self.pool.take_tail(self.chain, rest) else {
            return 0;
        };
        Arc::make_mut(&mut self.blocks).push(block);
        self.renew_windows();
        len
    }

    /// Caches the last block of the first `computed` tokens, which is only partly full, for a sequence that continues from it. Drop
    /// the table before its tokens change.
    pub fn leave_tail(&self, tokens: &[u32], computed: usize) {
        let filled = self.registered * self.pool.block_size();
        if let (Some(&block), true) = (self.blocks.get(self.registered), computed > filled) {
            self.pool
                .register_tail(block, self.chain, &tokens[filled..computed]);
        }
    }

    /// Replaces its unregistered blocks by blocks that other sequences have cached meanwhile: those of the longest known prefix of
    /// `tokens` after the registered blocks. Returns the number of tokens of all registered blocks.
    pub fn adopt(&mut self, tokens: &[u32]) -> usize {
        let size = self.pool.block_size();
        let rest = tokens.get(self.registered * size..).unwrap_or_default();
        let mut found = Vec::new();
        let held = (self.registered, self.first_window());
        let chain = self.pool.match_chain(self.chain, rest, held, &mut found);
        self.take_over(found, chain);
        self.registered * size
    }

    /// Appends cached blocks to the registered ones. The caller holds them, and `chain` ends with the last of them.
    pub(super) fn take_over(&mut self, found: Vec<u32>, chain: ChainId) {
        self.chain = chain;
        if !found.is_empty() {
            let before = self.registered;
            let replaced = self.registered..self.blocks.len().min(self.registered + found.len());
            self.registered += found.len();
            let blocks = Arc::make_mut(&mut self.blocks);
            let own: Vec<u32> = blocks.splice(replaced, found).collect();
            self.pool.let_windows_go(&own, before, |_| false);
            self.pool.release(&own);
            if let Some(next) = self
                .pool
                .first_seen(self.registered * self.pool.block_size())
            {
                let first = self.first_window();
                let passed = first..next.min(before).max(first);
                self.pool
                    .let_windows_go(&self.blocks[passed], first, |_| false);
                self.hold_windows_from(next.max(first));
            }
        }
    }

    /// The pool of its blocks.
    pub fn pool(&self) -> &Arc<BlockPool> {
        &self.pool
    }

    /// The blocks that are in the prefix cache.
    pub(super) fn registered_blocks(&self) -> &[u32] {
        &self.blocks[..self.registered]
    }

    /// Adds new blocks. If there are too few, adds none.
    pub(super) fn add_blocks(&mut self, count: usize) -> bool {
        count == 0 || self.pool.allocate(count, Arc::make_mut(&mut self.blocks))
    }

    /// The chain of the registered blocks, their number of tokens, and the block after them.
    pub(super) fn registered(&self) -> (ChainId, usize, Option<u32>) {
        let block = self.blocks.get(self.registered).copied();
        (self.chain, self.registered * self.pool.block_size(), block)
    }

    /// Whether both tables will register the same first block: the first block after the registered ones has the same tokens in
    /// both.
    pub fn shares_next_block(&self, tokens: &[u32], other: &Self, others: &[u32]) -> bool {
        let size = self.pool.block_size();
        let next = |table: &Self| table.registered * size..(table.registered + 1) * size;
        let block = tokens.get(next(self));
        self.pool.has_prefix_cache()
            && self.chain == other.chain
            && block.is_some()
            && block == others.get(next(other))
    }

    /// The slot for the K and V of token `position`: block id * block size + offset.
    pub fn slot(&self, position: usize) -> usize {
        let size = self.pool.block_size();
        self.blocks[position / size] as usize * size + position % size
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.drop_state();
        self.drop_windows();
        self.pool.release(&self.blocks);
    }
}
