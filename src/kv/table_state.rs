//! The recurrent state of one sequence.
//!
//! A sequence reads its state from one slot and writes it to another. If it begins with a snapshot, or has just taken one, the two
//! slots differ in its next step; otherwise it updates the state in place. So a snapshot needs no copy.

use std::sync::Arc;

use super::known::Known;
use super::slots::StateSlots;
use super::table::BlockTable;

impl BlockTable {
    /// Replaces its state by that of the longest known prefix of `tokens` beyond the first `computed`: its blocks, and the state
    /// after them. Returns the number of known tokens. Only for a model with recurrent layers.
    pub fn adopt_state(&mut self, tokens: &[u32], computed: usize) -> usize {
        let (chain, filled, _) = self.registered();
        let rest = tokens.get(filled..).unwrap_or_default();
        let beyond = computed.saturating_sub(filled);
        let Some(known) = self.pool().match_known(chain, rest, beyond) else {
            return computed;
        };
        let Known {
            blocks,
            chain,
            tokens,
            slot,
            source,
        } = known;
        self.take_over(blocks, chain);
        let pool = Arc::clone(self.pool());
        if let (Some(state), Some(states)) = (&mut self.state, pool.states()) {
            pool.release(state.source.as_slice());
            state.source = source;
            if state.from != state.to
                && let Some(read) = state.from
            {
                states.release(read);
            }
            state.from = Some(slot);
        }
        filled + tokens
    }

    /// Whether it has a slot to write a state to, or can get one.
    pub fn has_state_room(&self) -> bool {
        let (Some(state), Some(states)) = (&self.state, self.pool().states()) else {
            return true;
        };
        state.to.is_some()
            || states.has_room()
            || state.from.is_some_and(|read| states.is_alone(read))
    }

    /// Finds a slot to write the state to. If none is available, takes the slot of the snapshot from which it begins, unless
    /// another sequence reads it.
    pub(super) fn make_state_room(&mut self) -> bool {
        let pool = Arc::clone(self.pool());
        let (Some(state), Some(states)) = (&mut self.state, pool.states()) else {
            return true;
        };
        if state.to.is_none() {
            state.to = states
                .take()
                .or_else(|| state.from.filter(|&read| states.take_back(read)));
        }
        state.to.is_some()
    }

    /// What the next step does with its state. None if the model has no recurrent layers, or if no room was made.
    pub fn state_slots(&self) -> Option<StateSlots> {
        let state = self.state.as_ref()?;
        Some(StateSlots {
            from: state.from,
            to: state.to?,
            copied_block: state.source,
        })
    }

    /// Records that the step was computed: the state is now in the slot to which it was written.
    pub fn advance_state(&mut self) {
        let pool = Arc::clone(self.pool());
        if let (Some(state), Some(states)) = (&mut self.state, pool.states()) {
            pool.release(state.source.take().as_slice());
            if state.from != state.to
                && let Some(read) = state.from
            {
                states.release(read);
            }
            state.from = state.to;
        }
    }

    /// Takes a snapshot after the first `computed` of `tokens`, all of which are computed. Every sequence that continues from it,
    /// including this one, then writes to another slot.
    pub fn leave_snapshot(&mut self, tokens: &[u32], computed: usize) {
        let (chain, filled, block) = self.registered();
        let last = self.registered_blocks().last().copied();
        let pool = Arc::clone(self.pool());
        let (Some(state), Some(states)) = (&mut self.state, pool.states()) else {
            return;
        };
        // If the two differ, nothing has been computed since a snapshot.
        let (Some(slot), true) = (state.from, state.from == state.to) else {
            return;
        };
        if !pool.has_prefix_cache() || state.source.is_some() {
            return;
        }
        let tail = &tokens[filled..computed];
        let block = block.filter(|_| !tail.is_empty());
        let key = pool.state_key(chain, last, tail);
        if states.publish(slot, chain, tail, block, key) {
            state.to = None;
        }
        if let Some(block) = block {
            pool.note_tail(block, chain, tail);
        }
    }

    /// Whether it has a state.
    pub const fn has_state(&self) -> bool {
        self.state.is_some()
    }

    /// The slots that it holds.
    pub fn held_slots(&self) -> impl Iterator<Item = u32> {
        let state = self.state.iter();
        state.flat_map(|state| {
            let other = state.to.filter(|_| state.to != state.from);
            state.from.into_iter().chain(other)
        })
    }

    /// The block from which it will copy.
    pub fn copied_block(&self) -> Option<u32> {
        self.state.as_ref()?.source
    }

    pub(super) fn drop_state(&mut self) {
        let pool = Arc::clone(self.pool());
        if let Some(states) = pool.states() {
            for slot in self.held_slots() {
                states.release(slot);
            }
        }
        if let Some(state) = self.state.take() {
            pool.release(state.source.as_slice());
        }
    }
}
