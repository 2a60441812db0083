//! The slots of one sequence's recurrent state.

/// Slots of a table. Each is held once.
#[derive(Debug, Default)]
pub(super) struct TableState {
    /// The state behind what is computed; none: nothing is computed.
    pub(super) from: Option<u32>,
    /// Where the next step leaves it.
    pub(super) to: Option<u32>,
    /// A block to copy the keys and values from that come before those of the next step, in its own block.
    pub(super) source: Option<u32>,
}

/// What a step must know of a sequence's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateSlots {
    /// The slot with its state; none: zeros.
    pub from: Option<u32>,
    /// The slot that gets its state; it may be the same.
    pub to: u32,
    /// The block whose first tokens are copied to the sequence's own before anything is computed.
    pub copied_block: Option<u32>,
}
