//! The interface to the model: an [`Executor`] computes steps and embeddings.

use crate::error::{Error, Result};
use crate::kv::Place;
use crate::sched::Step;

/// The outcome of a step. Row `r` belongs to the step's `sample_rows[r]`.
#[derive(Debug, Default, Clone)]
pub struct StepOutput {
    /// Token ids, one per row; [`crate::sched::NO_TOKEN`] where the row's logits are not finite.
    pub tokens: Vec<u32>,
    /// Log-probability of each row's token; 0 if it was not requested.
    pub logprobs: Vec<f32>,
    /// The most likely tokens of each row with their log-probabilities, most likely first. Empty if they were not requested.
    pub top: Vec<Vec<(u32, f32)>>,
    /// For a model that drafts: the token that it predicts after each row's token.
    pub guesses: Vec<u32>,
}

/// The error code of a step that fails because the model has lost its memory. The model works again; the engine recomputes all
/// running requests.
pub const MEMORY_LOST: &str = "memory_lost";

/// The error code of steps and embeddings that fail because the process that computes them is down. All open requests fail with it,
/// and the model's memory is lost.
pub const WORKER_UNAVAILABLE: &str = "worker_unavailable";

/// A model that computes steps.
pub trait Executor {
    /// Starts a step. It may return before the device is done.
    ///
    /// # Errors
    /// Any fault of the model; the step's requests fail with it. See also [`MEMORY_LOST`] and [`WORKER_UNAVAILABLE`].
    fn launch(&mut self, step: &Step) -> Result<()>;

    /// Waits for the step's outcome.
    ///
    /// # Errors
    /// As [`Self::launch`].
    fn collect(&mut self, step: &Step, output: &mut StepOutput) -> Result<()>;

    /// L2-normalised embeddings, row after row, of the token sequences `token_ids[cu_seqlens[i]..cu_seqlens[i + 1]]`.
    ///
    /// # Errors
    /// As [`Self::launch`].
    fn embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Vec<f32>>;

    /// Like [`Self::embed`]. A model that computes long texts in several passes runs the first pass and returns `None`. An
    /// unfinished computation is dropped.
    ///
    /// # Errors
    /// As [`Self::launch`].
    fn begin_embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Option<Vec<f32>>> {
        self.embed(token_ids, cu_seqlens).map(Some)
    }

    /// Runs the next pass of what [`Self::begin_embed`] began. Returns the embeddings after the last pass.
    ///
    /// # Errors
    /// As [`Self::launch`]; `internal_error` if nothing was begun.
    fn go_on_embedding(&mut self) -> Result<Option<Vec<f32>>> {
        Err(Error::internal("no text was begun"))
    }

    /// Copies data out of the model's memory: a block, or a state followed by the block that holds its tail.
    ///
    /// # Errors
    /// As [`Self::launch`]; `internal_error` if the model's memory cannot be copied.
    fn save(&mut self, _place: Place) -> Result<Vec<u8>> {
        Err(no_copies())
    }

    /// Copies the bytes of [`Self::save`] into the model's memory, before the next step.
    ///
    /// # Errors
    /// As [`Self::save`], and `internal_error` for a wrong number of bytes.
    fn load(&mut self, _place: Place, _bytes: &[u8]) -> Result<()> {
        Err(no_copies())
    }
}

fn no_copies() -> Error {
    Error::internal("this model's memory cannot be copied")
}
