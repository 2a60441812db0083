//! Whoever drives a scheduler by hand reads the tokens of the sequences that ended, and none before.

use lmserve::sched::{FinishReason, StepTokens};

/// Ends nothing and keeps nothing.
pub struct NoEvents;

impl StepTokens for NoEvents {
    fn on_token(
        &mut self,
        _: u64,
        _: usize,
        _: u32,
        _: Option<FinishReason>,
    ) -> Option<FinishReason> {
        None
    }

    fn on_prompt_token(&mut self, _: u64, _: usize, _: u32) {}
}
