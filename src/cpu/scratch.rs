//! The memory that programs write.

use super::experts::ExpertMemory;
use super::heads::HeadsMemory;
use super::memory::Aligned;

/// Buffers that programs write, kept from step to step.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) buffers: Vec<Aligned<f32>>,
    pub(super) quantized: Aligned<u8>,
    /// One part of a linear layer whose parts have different formats.
    pub(super) part: Aligned<f32>,
    pub(super) experts: ExpertMemory,
    pub(super) heads: HeadsMemory,
    pub(super) logits: Aligned<f32>,
    /// The logits of predicted tokens.
    pub(super) draft_logits: Aligned<f32>,
    /// For each token of the step, the next one.
    pub(super) next_ids: Aligned<i32>,
}
