//! What a scheduler is told when it is made.

/// Tokens that a newly admitted sequence may compute in its first step even while a long prompt is being computed.
pub const ENTRY_TOKENS: usize = 16;

/// Sizes of the scheduler.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerConfig {
    /// Most sequences in a step.
    pub max_batch: usize,
    /// Most tokens in a step.
    pub max_batch_tokens: usize,
    /// Most tokens of a sequence, prompt and output.
    pub max_model_len: usize,
    /// Most sequences that wait.
    pub max_queue: usize,
}

/// How much is speculated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speculation {
    /// Most tokens drafted for a sequence in a step.
    pub max_draft: usize,
    /// Most rows that a step may sample.
    pub max_rows: usize,
    /// What a further row adds to the time of a step, as a share of what a step takes with no row at all: assumed until
    /// [`super::Scheduler::note_time`] has shown it.
    pub row_cost: f32,
}
