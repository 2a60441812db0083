//! What blocks hold, by the names that the tiers below know it by.

use std::collections::HashMap;

use super::chain::{ChainId, FIRST_CHAIN};
use crate::tier::{Digest, Key};

/// Where the model's memory has a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a block.
    Block(u32),
    /// In a slot, and in the block with the keys and values of the tokens behind the last full block, if there are such tokens.
    State {
        /// The slot.
        slot: u32,
        /// The block.
        tail_block: Option<u32>,
    },
}

/// The names of full blocks.
#[derive(Debug)]
pub(super) struct Contents {
    /// What names begin with, by the chain's root.
    pub(super) roots: HashMap<ChainId, Digest>,
    pub(super) digests: Vec<Option<Digest>>,
    /// Blocks that get their content before the next step, and do not hold it yet.
    pub(super) loading: Vec<u32>,
    /// Blocks that were given up since anybody looked; they hold their contents until the next step.
    pub(super) evicted: Vec<(Key, Place)>,
    /// Of these, the blocks that were not full: each with the chain before it and its tokens.
    pub(super) evicted_tails: Vec<(u32, ChainId, Vec<u32>)>,
}

impl Contents {
    pub(super) fn behind(&self, chain: ChainId, last: Option<u32>) -> Option<Digest> {
        match last {
            Some(block) => self.digests[block as usize],
            None if chain < FIRST_CHAIN => self.roots.get(&chain).copied(),
            None => None,
        }
    }

    /// Names a full block that follows those of `parent`, the last of which is `before`.
    pub(super) fn name(
        &mut self,
        block: u32,
        (parent, before): (ChainId, Option<u32>),
        tokens: &[u32],
    ) {
        let digest = self.behind(parent, before);
        self.digests[block as usize] = digest.map(|digest| digest.block(tokens));
    }

    pub(super) fn forget(&mut self, block: u32) {
        self.digests[block as usize] = None;
    }
}
