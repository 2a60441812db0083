//! What comes back from the tiers below into a table: blocks, and a state behind them.

use std::sync::Arc;

use super::contents::Place;
use super::table::BlockTable;

/// Blocks to load: each with its place among those that were read.
pub type Loads = Vec<(u32, usize)>;

impl BlockTable {
    /// Adopts what the pool has of the first `end` full blocks of `tokens`, and makes room for the others, which are known from
    /// block `first` on and get their contents before the next step. None if a block before `first` is missing or there is no room;
    /// the table is to be made anew then.
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
            // Where another block has the same tokens, it took this one's place.
            if self.blocks()[at] == block {
                self.pool().note_loading(block);
                loads.push((block, at - first));
            }
        }
        Some(loads)
    }

    /// As [`Self::restore_blocks`], with the state behind the `tail` tokens after them. Returns where that goes, too.
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
        // The tail's block comes with the others, so that there is room for all or for none.
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
