//! The slots of one sequence's recurrent state.

/// The slots of a table. Each is held once.
#[derive(Debug, Default)]
pub(super) struct TableState {
    /// The slot with the state after the computed tokens. None: nothing has been computed.
    pub(super) from: Option<u32>,
    /// The slot to which the next step writes it.
    pub(super) to: Option<u32>,
    /// A block whose keys and values must be copied into the sequence's own block before the next step.
    pub(super) source: Option<u32>,
}

/// What a step needs to know about a sequence's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateSlots {
    /// The slot with its state. None: the state begins with zeros.
    pub from: Option<u32>,
    /// The slot for its next state. It may be the same slot.
    pub to: u32,
    /// The block whose first tokens are copied into the sequence's own block before the step.
    pub copied_block: Option<u32>,
}
