//! Finds how much of a prefix a model with recurrent layers can reuse: the prefix's blocks, and the state right after them.

use super::chain::{ChainId, Owner};
use super::pool::BlockPool;
use super::shelves::Shelves;
use super::state::Found;

/// A known prefix. Its blocks and its slot are held for the caller, who must release them.
#[derive(Debug)]
pub(super) struct Known {
    /// Full blocks.
    pub(super) blocks: Vec<u32>,
    /// Chain of the last of them.
    pub(super) chain: ChainId,
    /// Tokens of the prefix.
    pub(super) tokens: usize,
    /// The state after them.
    pub(super) slot: u32,
    /// The block with the keys and values of the tokens after the full blocks, which must be copied; absent if there are no such tokens.
    pub(super) source: Option<u32>,
}

impl BlockPool {
    /// The longest known prefix of `tokens` with more than `beyond` tokens. `tokens` follow those of `chain`.
    pub(super) fn match_known(
        &self,
        chain: ChainId,
        tokens: &[u32],
        beyond: usize,
    ) -> Option<Known> {
        let mut shelves = self.shelves();
        let (mut path, found) = self.search(&shelves, chain, tokens, beyond, true)?;
        let last = path.last().map_or(chain, |&(_, chain)| chain);
        for &(block, _) in &path {
            shelves.retain(block);
        }
        if let Some(block) = found.tail_block {
            shelves.retain(block);
        }
        let tokens = path.len() * self.block_size() + found.tail;
        Some(Known {
            blocks: path.drain(..).map(|(block, _)| block).collect(),
            chain: last,
            tokens,
            slot: found.slot,
            source: found.tail_block,
        })
    }

    /// Number of tokens of the longest known prefix of `tokens`.
    pub(super) fn count_known(&self, owner: Owner, tokens: &[u32]) -> usize {
        let shelves = self.shelves();
        let found = self.search(&shelves, self.root(owner), tokens, 0, false);
        found.map_or(0, |(path, found)| {
            path.len() * self.block_size() + found.tail
        })
    }

    /// The blocks before a snapshot, each with its chain, and the snapshot.
    fn search(
        &self,
        shelves: &Shelves,
        chain: ChainId,
        tokens: &[u32],
        beyond: usize,
        hold: bool,
    ) -> Option<(Vec<(u32, ChainId)>, Found)> {
        let (states, size) = (self.states()?, self.block_size());
        if !self.has_prefix_cache() {
            return None;
        }
        let mut path: Vec<(u32, ChainId)> = Vec::new();
        let mut last = chain;
        for chunk in tokens.chunks_exact(size) {
            let Some((block, next)) = shelves.find(last, chunk) else {
                break;
            };
            path.push((block, next));
            last = next;
        }
        loop {
            let filled = path.len() * size;
            if filled + size <= beyond + 1 {
                return None;
            }
            let chain = path.last().map_or(chain, |&(_, chain)| chain);
            let usable = |tail: &[u32], block| shelves.holds(block, chain, tail);
            let more = beyond.checked_sub(filled);
            if let Some(found) = states.longest(chain, &tokens[filled..], more, usable, hold) {
                return Some((path, found));
            }
            path.pop()?;
        }
    }
}
