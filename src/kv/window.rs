//! How much of a prefix layers with a sliding window can reuse, and the counts of their blocks.

use super::chain::ChainId;
use super::pool::BlockPool;
use super::shelves::Shelves;
use super::window_blocks::{WindowBlocks, WindowCounts, first_seen};

impl Shelves {
    /// The cached blocks of the longest reusable prefix of `tokens`, each with its chain. They follow `before` blocks, of which
    /// those from `first` on have window blocks.
    pub(super) fn known_path(
        &self,
        mut chain: ChainId,
        tokens: &[u32],
        (before, first): (usize, usize),
    ) -> Vec<(u32, ChainId)> {
        let (mut path, mut usable, mut unbroken) = (Vec::new(), 0, first);
        for chunk in tokens.chunks_exact(self.block_size) {
            let Some((block, next)) = self.find(chain, chunk) else {
                break;
            };
            path.push((block, next));
            chain = next;
            let blocks = before + path.len();
            if let Some(windows) = &self.windows {
                if !windows.has(block) {
                    unbroken = blocks;
                }
                if unbroken > windows.first_seen(blocks * self.block_size) {
                    continue;
                }
            }
            usable = path.len();
        }
        path.truncate(usable);
        path
    }

    /// Marks a block without content as free.
    pub(super) fn set_free(&mut self, block: u32) {
        if let Some(windows) = &mut self.windows {
            windows.discard(block);
        }
        self.free.push(block);
    }
}

impl BlockPool {
    /// The pool of a model in which some layers see only the last `window` tokens, with `num_blocks` blocks for these layers.
    #[must_use]
    pub fn with_windows(mut self, window: usize, num_blocks: usize) -> Self {
        let windows = (num_blocks > 0).then(|| {
            WindowBlocks::new(
                window.max(1),
                self.block_size(),
                num_blocks,
                self.num_blocks(),
            )
        });
        self.window = windows.as_ref().map(|windows| windows.window);
        self.shelves().windows = windows;
        self
    }

    /// Number of window blocks that a step of `tokens` tokens of one sequence needs at least.
    pub fn least_window_blocks(&self, tokens: usize) -> usize {
        let size = self.block_size();
        let most = |window: usize| self.window_blocks_of(window) + tokens.div_ceil(size) + 1;
        self.window
            .map_or(0, |window| most(window).min(self.num_blocks()))
    }

    const fn window_blocks_of(&self, window: usize) -> usize {
        window.div_ceil(self.block_size()) + 1
    }

    /// Whether there are enough window blocks for everything that a sequence sees at once, with `new` blocks that it does not have
    /// yet, and for the `at_once` of these that its first step needs.
    pub fn has_window_room(&self, new: usize, at_once: usize) -> bool {
        let Some(window) = self.window else {
            return true;
        };
        let available = self
            .shelves()
            .windows
            .as_ref()
            .map_or(0, WindowBlocks::available);
        let seen = new.min(self.window_blocks_of(window) + 1);
        seen.max(at_once) <= available
    }

    /// Number of window blocks by state. All are 0 if no layer has a window.
    pub fn window_counts(&self) -> WindowCounts {
        let shelves = self.shelves();
        shelves
            .windows
            .as_ref()
            .map(WindowBlocks::counts)
            .unwrap_or_default()
    }

    /// Number of tables that hold each window block.
    pub fn window_references(&self) -> Vec<u32> {
        let shelves = self.shelves();
        let windows = shelves.windows.as_ref();
        windows.map_or_else(Vec::new, |windows| windows.references.clone())
    }

    /// The first block that the token at position `tokens` sees in a window. None if no layer has a window.
    pub(super) fn first_seen(&self, tokens: usize) -> Option<usize> {
        self.window
            .map(|window| first_seen(tokens, window, self.block_size()))
    }

    /// Releases the window blocks of `blocks`, which begin at index `from` of a sequence. `is_end` says by index whether somebody
    /// may continue there.
    pub(super) fn let_windows_go(
        &self,
        blocks: &[u32],
        from: usize,
        is_end: impl Fn(usize) -> bool,
    ) {
        let mut shelves = self.shelves();
        if let Some(windows) = &mut shelves.windows {
            for (index, &block) in blocks.iter().enumerate().rev() {
                windows.let_go(block, is_end(from + index));
            }
        }
    }

    /// The window blocks of those blocks that have one.
    pub(super) fn window_blocks(&self, blocks: &[u32]) -> Vec<u32> {
        let shelves = self.shelves();
        let of_block = |&block: &u32| shelves.windows.as_ref()?.of_block[block as usize];
        blocks.iter().filter_map(of_block).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kv::BlockTable;

    const SIZE: usize = 4;
    const WINDOW: usize = 8;
    /// The window blocks of a full window and the next token.
    const HELD: usize = WINDOW / SIZE + 1;

    fn pool(blocks: usize, window_blocks: usize) -> Arc<BlockPool> {
        Arc::new(BlockPool::new(blocks, SIZE, true).with_windows(WINDOW, window_blocks))
    }

    /// Computes `tokens` after the known ones, `step` at a time. Returns the table, and the number of known tokens.
    fn run(
        pool: &Arc<BlockPool>,
        tokens: &[u32],
        step: usize,
        borders: &[usize],
    ) -> (BlockTable, usize) {
        let mut table = BlockTable::from_prefix(pool, 0, tokens);
        let known = table.known() + table.take_tail(tokens);
        let mut computed = known;
        while computed < tokens.len() {
            computed = tokens.len().min(computed + step);
            assert!(table.grow(computed));
            table.register(tokens, computed);
            table.slide(computed, borders);
        }
        (table, known)
    }

    fn finish(pool: &Arc<BlockPool>, tokens: &[u32]) -> usize {
        let (table, known) = run(pool, tokens, 3, &[]);
        table.leave_tail(tokens, tokens.len());
        known
    }

    #[test]
    fn a_sequence_of_32768_tokens_holds_a_window_and_a_block() {
        let pool = pool(8192, HELD + 1);
        let tokens: Vec<u32> = (0..32768).collect();
        let mut table = BlockTable::from_prefix(&pool, 0, &[]);
        for computed in 1..=tokens.len() {
            assert!(table.grow(computed));
            let slot = table.window_slot(computed - 1).unwrap();
            let window = table.window().unwrap();
            assert_eq!(
                Some(&((slot / SIZE) as u32)),
                window.blocks.last(),
                "{computed}"
            );
            table.register(&tokens, computed);
            table.slide(computed, &[]);
            assert!(table.window().unwrap().blocks.len() <= HELD);
            assert!(pool.window_counts().owned <= HELD);
        }
        assert_eq!(table.blocks().len(), 8192);
        drop(table);
        assert_eq!(pool.window_counts().owned, 0);
    }

    #[test]
    fn a_prefix_is_known_at_its_end_alone_once_the_middle_is_given_up() {
        let pool = pool(100, HELD + 1);
        let tokens: Vec<u32> = (0..46).collect();
        assert_eq!(finish(&pool, &tokens), 0);
        let longer: Vec<u32> = (0..60).collect();
        assert_eq!(pool.cached_prefix(0, &longer), 46);
        // All blocks before them are known, but their window blocks are gone.
        assert_eq!(pool.cached_prefix(0, &longer[..36]), 0);
        assert_eq!(finish(&pool, &longer), 46);
        // When the middle is computed again, the known blocks get window blocks again.
        let other: Vec<u32> = (0..36).chain(100..103).collect();
        assert_eq!(finish(&pool, &other), 0);
        assert_eq!(pool.cached_prefix(0, &other), 39);
        assert_eq!(pool.counts().free, 100 - 15 - 1);
    }

    #[test]
    fn window_blocks_of_ends_and_borders_outlive_those_between() {
        let pool = pool(100, 3 * HELD + 1);
        let system: Vec<u32> = (0..20).collect();
        let first: Vec<u32> = (0..80).collect();
        let (table, _) = run(&pool, &first, 3, &[20]);
        drop(table);
        // Needs more window blocks than there are free ones.
        let second: Vec<u32> = (1000..1100).collect();
        let (table, _) = run(&pool, &second, 3, &[]);
        assert_eq!(pool.cached_prefix(0, &first), 80);
        assert_eq!(pool.cached_prefix(0, &system), 20);
        assert_eq!(pool.cached_prefix(0, &first[..48]), 20);
        drop(table);
    }

    #[test]
    fn two_sequences_share_the_window_blocks_of_a_prefix() {
        let pool = pool(100, 4 * HELD);
        let tokens: Vec<u32> = (0..41).collect();
        let (first, _) = run(&pool, &tokens, 3, &[]);
        let (second, known) = run(&pool, &tokens, 3, &[]);
        assert_eq!(known, 40);
        let held = pool.window_references();
        assert_eq!(held.iter().filter(|&&count| count == 2).count(), HELD - 1);
        // A sequence that computed the prefix itself takes what is known after it.
        let longer: Vec<u32> = (0..60).collect();
        let (third, _) = run(&pool, &longer, 3, &[]);
        let mut late = BlockTable::from_prefix(&pool, 0, &longer[..12]);
        assert!(late.grow(14));
        assert_eq!(late.adopt(&longer), 60);
        assert_eq!(
            late.window().unwrap().blocks,
            third.window().unwrap().blocks
        );
        drop((first, second, third, late));
        assert_eq!(pool.window_counts().owned, 0);
    }

    #[test]
    fn drafts_and_tokens_that_are_computed_twice_hold_no_window_block_for_long() {
        let pool = pool(100, 4 * HELD);
        let tokens: Vec<u32> = (0..30).collect();
        let (mut first, _) = run(&pool, &tokens, 3, &[]);
        assert!(first.grow(50));
        first.truncate(30);
        assert_eq!(pool.window_counts().owned, HELD);
        let mut second = BlockTable::from_prefix(&pool, 0, &[]);
        assert!(second.grow(8));
        second.register(&tokens, 8);
        second.slide(8, &[]);
        assert_eq!(second.blocks(), &first.blocks()[..2]);
        drop((first, second));
        assert_eq!(pool.window_counts().owned, 0);
        let counts = pool.window_counts();
        assert_eq!(counts.free + counts.cached, 4 * HELD);
    }
}
