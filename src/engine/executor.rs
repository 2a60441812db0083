//! The interface to the model. An [`Executor`] computes steps, and knows nothing else.

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
    /// The most likely tokens of each row with their log-probabilities, the best first; empty if they were not requested.
    pub top: Vec<Vec<(u32, f32)>>,
    /// Of a model that guesses ahead: the token that may follow each row's.
    pub guesses: Vec<u32>,
}

/// The code of an error with which a step fails because the model has lost its memory, which works again. The step's requests, and
/// all others that run, are computed anew.
pub const MEMORY_LOST: &str = "memory_lost";

/// The code of an error with which steps and embeddings fail while the process that computes them is down. All open requests fail with
/// it, and the model's memory is lost.
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

    /// The same, or `None` of a model that computes long texts in several passes, of which this was the first. What was begun
    /// before and is not done is dropped.
    ///
    /// # Errors
    /// As [`Self::launch`].
    fn begin_embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Option<Vec<f32>>> {
        self.embed(token_ids, cu_seqlens).map(Some)
    }

    /// Computes the next pass of what [`Self::begin_embed`] began, and gives the embeddings if it was the last.
    ///
    /// # Errors
    /// As [`Self::launch`]; `internal_error` if nothing was begun.
    fn go_on_embedding(&mut self) -> Result<Option<Vec<f32>>> {
        Err(Error::internal("no text was begun"))
    }

    /// Copies a content out of the model's memory: a block, or a state and the whole block with its tail after it.
    ///
    /// # Errors
    /// As [`Self::launch`]; `internal_error` of a model whose memory cannot be copied.
    fn save(&mut self, _place: Place) -> Result<Vec<u8>> {
        Err(no_copies())
    }

    /// Copies what [`Self::save`] gave into the model's memory, before the next step.
    ///
    /// # Errors
    /// As [`Self::save`], and where the bytes are not of the right number.
    fn load(&mut self, _place: Place, _bytes: &[u8]) -> Result<()> {
        Err(no_copies())
    }
}

fn no_copies() -> Error {
    Error::internal("this model's memory cannot be copied")
}
