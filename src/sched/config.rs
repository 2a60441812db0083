//! Configuration of a scheduler.

/// Number of tokens that a newly admitted sequence may compute in its first step, even while a long prompt is being computed.
pub const ENTRY_TOKENS: usize = 16;

/// Sizes of the scheduler.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerConfig {
    /// Maximum number of sequences in a step.
    pub max_batch: usize,
    /// Maximum number of tokens in a step.
    pub max_batch_tokens: usize,
    /// Maximum number of tokens of a sequence, prompt and output together.
    pub max_model_len: usize,
    /// Maximum number of waiting sequences.
    pub max_queue: usize,
}

/// Limits of speculation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speculation {
    /// Maximum number of tokens that are drafted from a sequence's own text in a step. What a model guesses itself is drafted besides.
    pub max_draft: usize,
    /// Maximum number of rows that a step may sample.
    pub max_rows: usize,
    /// Marginal time of one row, as a share of the time of a step without rows. It is assumed until
    /// [`super::Scheduler::note_time`] has measured it.
    pub row_cost: f32,
}
