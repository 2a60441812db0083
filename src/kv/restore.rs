//! Restores a table from the tiers below: its blocks, and a state after them.

use std::sync::Arc;

use super::contents::Place;
use super::table::BlockTable;

/// Blocks to load, each with its index among those that were read.
pub type Loads = Vec<(u32, usize)>;

impl BlockTable {
    /// Takes the cached ones of the first `end` full blocks of `tokens`, and allocates the others. The blocks from `first` on were
    /// read from below, and get their contents before the next step. Returns None if a block before `first` is missing, or there is
    /// no room; the table must then be created again.
    pub fn restore_blocks(&mut self, tokens: &[u32], first: usize, end: usize) -> Option<Loads> {
        let size = self.pool().block_size();
        let known = &tokens[..end * size];
        if self.adopt(known) < first * size {
            return None;
        }
        let missing = end.saturating_sub(self.blocks().len());
        if !self.add_blocks(missing) {
            return None;
        }
        let adopted = self.registered_blocks().len();
        let own = self.blocks().to_vec();
        self.register(tokens, end * size);
        let mut loads = Loads::new();
        for (at, &block) in own.iter().enumerate().take(end).skip(adopted) {
            // If another block has the same tokens already, that one is used.
            if self.blocks()[at] == block {
                self.pool().note_loading(block);
                loads.push((block, at - first));
            }
        }
        Some(loads)
    }

    /// Like [`Self::restore_blocks`], with the state after the next `tail` tokens. Also returns the state's place.
    pub fn restore_state(
        &mut self,
        tokens: &[u32],
        (first, end): (usize, usize),
        tail: usize,
    ) -> Option<(Loads, Place)> {
        if !self.make_state_room() {
            return None;
        }
        let size = self.pool().block_size();
        if self.adopt(&tokens[..end * size]) < first * size || self.blocks().len() > end {
            return None;
        }
        // The tail's block is allocated with the others: all or none.
        let missing = end + usize::from(tail > 0) - self.blocks().len();
        if !self.add_blocks(missing) {
            return None;
        }
        let loads = self.restore_blocks(tokens, first, end)?;
        let tail_block = (tail > 0).then(|| self.blocks()[end]);
        let pool = Arc::clone(self.pool());
        let (state, states) = (self.state.as_mut()?, pool.states()?);
        let slot = state.to?;
        if let Some(read) = state.from.filter(|&read| read != slot) {
            states.release(read);
        }
        state.from = Some(slot);
        pool.release(state.source.take().as_slice());
        states.note_loading(slot);
        if let Some(block) = tail_block {
            pool.note_loading(block);
        }
        Some((loads, Place::State { slot, tail_block }))
    }
}
