//! A step while it is planned: who gets how many tokens.

use super::config::SchedulerConfig;

/// What one running sequence computes in a step.
#[derive(Debug, Default)]
pub(super) struct Grant {
    /// Its next known tokens.
    pub(super) tokens: usize,
    /// Tokens that may come after all known ones.
    pub(super) drafts: Vec<u32>,
}

/// A step while it is planned.
#[derive(Debug)]
pub(super) struct Plan {
    /// Tokens that nobody has been granted.
    pub(super) budget: usize,
    /// One for each running sequence, in their order.
    pub(super) grants: Vec<Grant>,
}

impl Plan {
    /// Nothing is granted to that many running sequences yet.
    pub(super) fn new(config: &SchedulerConfig, running: usize) -> Self {
        let mut grants = Vec::with_capacity(config.max_batch);
        grants.resize_with(running, Grant::default);
        Self {
            budget: config.max_batch_tokens,
            grants,
        }
    }
}

/// Sequences of a step that failed, each with the number of its tokens in that step; in a model with recurrent layers with the
/// number of all its tokens that the step would have left computed.
#[derive(Debug)]
pub(super) struct Part(pub(super) Vec<(u64, usize)>);
