//! Copies a model's blocks and states, to keep them elsewhere.

use super::attention::PAGE;
use super::model::Model;
use crate::error::{Error, Result};

impl Model {
    /// Bytes of a block with its keys and values, and bytes of a state.
    pub fn copy_sizes(&self) -> (usize, usize) {
        let pages = self.architecture.shape.block_size / PAGE;
        (pages * self.cache.page_bytes(), self.states.slot_bytes())
    }

    /// The bytes of a state (if `slot` is set), followed by those of a block (if `block` is set).
    ///
    /// # Errors
    /// `internal_error` for a slot or a block that does not exist.
    pub fn save(&self, slot: Option<u32>, block: Option<u32>) -> Result<Vec<u8>> {
        self.check_places(slot, block)?;
        let pages = self.architecture.shape.block_size / PAGE;
        let mut bytes = Vec::with_capacity(self.bytes_of(slot, block));
        if let Some(slot) = slot {
            self.states.read_slot(slot as usize, &mut bytes);
        }
        if let Some(block) = block {
            self.cache
                .read_pages(block as usize * pages, pages, &mut bytes);
        }
        Ok(bytes)
    }

    /// Writes the bytes of [`Self::save`] into the model's memory.
    ///
    /// # Errors
    /// As [`Self::save`], and for a wrong number of bytes. Nothing is written then.
    pub fn load(&mut self, slot: Option<u32>, block: Option<u32>, bytes: &[u8]) -> Result<()> {
        self.check_places(slot, block)?;
        let expected = self.bytes_of(slot, block);
        if bytes.len() != expected {
            let given = bytes.len();
            let message = format!("{expected} bytes are to be loaded, but {given} were given");
            return Err(Error::internal(message));
        }
        let pages = self.architecture.shape.block_size / PAGE;
        let of_state = slot.map_or(0, |_| self.states.slot_bytes());
        let (state, of_block) = bytes.split_at(of_state);
        if let Some(slot) = slot {
            self.states.write_slot(slot as usize, state);
        }
        if let Some(block) = block {
            self.cache
                .write_pages(block as usize * pages, pages, of_block);
        }
        Ok(())
    }

    fn bytes_of(&self, slot: Option<u32>, block: Option<u32>) -> usize {
        let (of_block, of_state) = self.copy_sizes();
        slot.map_or(0, |_| of_state) + block.map_or(0, |_| of_block)
    }

    fn check_places(&self, slot: Option<u32>, block: Option<u32>) -> Result<()> {
        let (slots, blocks) = (self.states.slots(), self.architecture.shape.num_blocks);
        let there = |place: Option<u32>, count| place.is_none_or(|place| (place as usize) < count);
        if there(slot, slots) && there(block, blocks) {
            return Ok(());
        }
        let message = format!(
            "slot {slot:?} or block {block:?} is not there: there are {slots} and {blocks}"
        );
        Err(Error::internal(message))
    }
}
