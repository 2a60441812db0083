//! The memory that programs write to.

use super::experts::ExpertMemory;
use super::heads::HeadsMemory;
use super::memory::Aligned;

/// What programs write, kept from step to step.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) buffers: Vec<Aligned<f32>>,
    pub(super) quantized: Aligned<u8>,
    /// One part of a linear layer whose parts differ.
    pub(super) part: Aligned<f32>,
    pub(super) experts: ExpertMemory,
    pub(super) heads: HeadsMemory,
    pub(super) logits: Aligned<f32>,
    /// Of the rows of a draft.
    pub(super) draft_logits: Aligned<f32>,
    /// For each token of the step the one that follows it.
    pub(super) next_ids: Aligned<i32>,
}
