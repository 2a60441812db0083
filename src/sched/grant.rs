//! A step while it is being planned: which sequence gets how many tokens.

use super::config::SchedulerConfig;

/// What one running sequence computes in a step.
#[derive(Debug, Default)]
pub(super) struct Grant {
    /// Its next known tokens.
    pub(super) tokens: usize,
    /// Draft tokens after all known ones.
    pub(super) drafts: Vec<u32>,
    /// The model itself has guessed them, by a head made for that.
    pub(super) guessed: bool,
}

/// A step while it is being planned.
#[derive(Debug)]
pub(super) struct Plan {
    /// Tokens of the budget that are not granted yet.
    pub(super) budget: usize,
    /// One grant per running sequence, in their order.
    pub(super) grants: Vec<Grant>,
}

impl Plan {
    /// A plan for this many running sequences, with nothing granted yet.
    pub(super) fn new(config: &SchedulerConfig, running: usize) -> Self {
        let mut grants = Vec::with_capacity(config.max_batch);
        grants.resize_with(running, Grant::default);
        Self {
            budget: config.max_batch_tokens,
            grants,
        }
    }
}

/// Sequences of a failed step, each with the number of its tokens in that step. In a model with recurrent layers, each has the
/// number of all its tokens that would have been computed after the step.
#[derive(Debug)]
pub(super) struct Part(pub(super) Vec<(u64, usize)>);
