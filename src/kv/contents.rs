//! The contents of blocks, by the keys under which the tiers below know them.

use std::collections::HashMap;

use super::chain::{ChainId, FIRST_CHAIN};
use crate::tier::{Digest, Key};

/// Where a content is in the model's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a block.
    Block(u32),
    /// A state in a slot. If tokens follow the last full block, their keys and values are in a block of their own.
    State {
        /// The slot.
        slot: u32,
        /// The block.
        tail_block: Option<u32>,
    },
}

/// The keys of full blocks.
#[derive(Debug)]
pub(super) struct Contents {
    /// The beginning of each owner's keys, by the root of its chains.
    pub(super) roots: HashMap<ChainId, Digest>,
    pub(super) digests: Vec<Option<Digest>>,
    /// Blocks that get their content before the next step, and do not have it yet.
    pub(super) loading: Vec<u32>,
    /// Blocks that were evicted since the last call. They keep their contents until the next step.
    pub(super) evicted: Vec<(Key, Place)>,
    /// Evicted blocks that were only partly full: each with the chain before it, and its tokens.
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

    /// Sets the key of a full block. It follows the tokens of `parent`, whose last block is `before`.
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
