//! What is copied between the model's memory and the tiers below it.

use crate::kv::Place;
use crate::tier::{Key, Payload};

/// A content to copy out of the model's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Save {
    /// What it is.
    pub key: Key,
    /// Where it lies.
    pub place: Place,
    /// The model's memory gives it up.
    pub evicted: bool,
}

/// A content to copy into the model's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// Where it goes.
    pub place: Place,
    /// Its bytes.
    pub payload: Payload,
}

/// What is to be copied after a plan and before its step, in this order, whether the step computes something or not.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct Transfers {
    pub saves: Vec<Save>,
    pub loads: Vec<Load>,
}

/// What was read for a sequence.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) first: usize,
    pub(super) blocks: Vec<Payload>,
    pub(super) state: Option<(usize, Payload)>,
}

impl Staged {
    pub(super) fn bytes(&self) -> usize {
        let state = self.state.iter().map(|(_, payload)| payload);
        self.blocks
            .iter()
            .chain(state)
            .map(|payload| payload.len())
            .sum()
    }
}
