//! What the tiers below have of a sequence's prefix, and what is on its way.

use std::collections::VecDeque;
use std::sync::Arc;

use super::sequence::Sequence;
use super::transfers::{Load, Staged, Transfers};
use crate::kv::{BlockPool, BlockTable, Loads, Place};
use crate::tier::{Below, Digest, Key, Payload};

/// Contents of sequences that have ended that are remembered until they are copied.
const MAX_UNSAVED: usize = 1 << 16;

/// Contents that a sequence can go on from.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Blocks before the first of them.
    pub(super) first: usize,
    /// Blocks, and a state behind them in a model with recurrent layers.
    pub(super) keys: Vec<Key>,
    /// Tokens of the state behind the last full block.
    pub(super) tail: Option<usize>,
}

#[derive(Debug)]
pub(super) struct Fetching {
    pub(super) sequence: Box<Sequence>,
    pub(super) line: u32,
    pub(super) wanted: Wanted,
}

/// The tiers below, and what is on its way.
#[derive(Debug)]
pub(super) struct Lower {
    pub(super) tiers: Box<dyn Below>,
    /// In order of arrival. The first is being read, if one is.
    pub(super) fetching: VecDeque<Fetching>,
    pub(super) in_flight: Option<u64>,
    /// Contents of sequences that have ended.
    pub(super) unsaved: VecDeque<(Key, Place)>,
    /// Of these, most that are copied at a time.
    pub(super) saves_at_once: usize,
    pub(super) transfers: Transfers,
}

impl Sequence {
    /// What the tiers have of its prefix beyond what the pool has.
    pub(super) fn wanted(&self, pool: &BlockPool, tiers: &dyn Below) -> Option<Wanted> {
        let tokens = &self.tokens[..self.attachable()];
        let size = pool.block_size();
        let mut digests = pool.named_prefixes(self.new.owner(), tokens);
        let first = digests.len().checked_sub(1)?;
        let mut digest = *digests.last()?;
        for chunk in tokens[first * size..].chunks_exact(size) {
            digest = digest.block(chunk);
            if !tiers.holds(&digest.block_key()) {
                break;
            }
            digests.push(digest);
        }
        let state = if pool.states().is_some() {
            let known = pool.cached_prefix(self.new.owner(), tokens);
            Some(find_state(&digests, tokens, (size, known), tiers)?)
        } else {
            None
        };
        let end = state.map_or(digests.len() - 1, |(end, ..)| end);
        let blocks = digests.get(first + 1..=end).unwrap_or_default();
        let mut keys: Vec<Key> = blocks.iter().copied().map(Digest::block_key).collect();
        keys.extend(state.map(|(.., key)| key));
        (!keys.is_empty()).then(|| Wanted {
            first: first.min(end),
            keys,
            tail: state.map(|(_, tail, _)| tail),
        })
    }

    /// Begins with what was read for it, beyond what the pool has. Returns what is to be loaded.
    pub(super) fn restore(&mut self, pool: &Arc<BlockPool>, staged: &Staged) -> Vec<Load> {
        let size = pool.block_size();
        let end = staged.first + staged.blocks.len();
        let tail = staged.state.as_ref().map_or(0, |&(tail, _)| tail);
        let reached = end * size + tail;
        if reached <= self.computed || reached > self.attachable() {
            return Vec::new();
        }
        let (tokens, table): (&[u32], &mut BlockTable) = (&self.tokens, &mut self.table);
        let restored = match &staged.state {
            None => table
                .restore_blocks(tokens, staged.first, end)
                .map(|loads| (loads, None)),
            Some((_, payload)) => table
                .restore_state(tokens, (staged.first, end), tail)
                .map(|(loads, place)| (loads, Some((place, payload)))),
        };
        let Some((blocks, state)) = restored else {
            self.attach_prefix(pool);
            return Vec::new();
        };
        self.computed = reached;
        self.snapshot = reached;
        loads(&blocks, &staged.blocks, state)
    }
}

fn loads(blocks: &Loads, read: &[Payload], state: Option<(Place, &Payload)>) -> Vec<Load> {
    let block = |&(block, at): &(u32, usize)| Load {
        place: Place::Block(block),
        payload: Payload::clone(&read[at]),
    };
    let state = state.map(|(place, payload)| Load {
        place,
        payload: Payload::clone(payload),
    });
    blocks.iter().map(block).chain(state).collect()
}

/// The state that lies furthest behind `known` tokens, of those whose blocks are all at hand: full blocks before it, tokens behind
/// these, and its name.
fn find_state(
    digests: &[Digest],
    tokens: &[u32],
    (size, known): (usize, usize),
    tiers: &dyn Below,
) -> Option<(usize, usize, Key)> {
    for (blocks, digest) in digests.iter().enumerate().rev() {
        let filled = blocks * size;
        let most = (size - 1).min(tokens.len() - filled);
        for tail in (0..=most).rev() {
            if filled + tail <= known {
                return None;
            }
            let key = digest.state_key(&tokens[filled..filled + tail]);
            if tiers.holds(&key) {
                return Some((blocks, tail, key));
            }
        }
    }
    None
}

impl Lower {
    /// Remembers what a sequence that has ended leaves, to be written down.
    pub(super) fn note_ended(&mut self, table: &BlockTable) {
        // The last one first, so that of contents which are there already the first is the one that was used last.
        let contents = table.contents();
        let mut missing: Vec<_> = contents.into_iter().rev().collect();
        missing.retain(|(key, _)| self.tiers.wants(key));
        // And written in order, for one without those before it is of no use.
        self.unsaved.extend(missing.into_iter().rev());
        let most = self.unsaved.len().saturating_sub(MAX_UNSAVED);
        self.unsaved.drain(..most);
    }

    /// The sequence of that id, if its prefix is being read or waits for that.
    pub(super) fn remove(&mut self, id: u64) -> Option<Box<Sequence>> {
        let at = self.fetching.iter().position(|f| f.sequence.id() == id)?;
        Some(self.fetching.remove(at)?.sequence)
    }

    /// The sequences whose prefixes are being read or wait for that.
    pub(super) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.fetching.iter().map(|fetching| &*fetching.sequence)
    }
}
