//! The arrays that a step is written into and its outcome read from.

use pyo3::buffer::{Element, PyBuffer};
use pyo3::prelude::*;

/// The bytes of `values`, each as `to_bytes` gives it.
pub(super) fn bytes_of<T: Copy, const N: usize>(
    values: &[T],
    to_bytes: impl Fn(T) -> [u8; N],
) -> Vec<u8> {
    values.iter().flat_map(|&value| to_bytes(value)).collect()
}

/// `StepBuffers` of `lmserve/model/interface.py`.
pub(super) struct StepBuffers {
    pub(super) token_ids: PyBuffer<i32>,
    pub(super) positions: PyBuffer<i32>,
    pub(super) slots: PyBuffer<i32>,
    pub(super) query_start: PyBuffer<i32>,
    pub(super) context_lens: PyBuffer<i32>,
    pub(super) block_tables: PyBuffer<i32>,
    pub(super) sample_rows: PyBuffer<i32>,
    pub(super) next_tokens: PyBuffer<i32>,
    pub(super) drafts: PyBuffer<i32>,
    pub(super) temperature: PyBuffer<f32>,
    pub(super) top_k: PyBuffer<i32>,
    pub(super) top_p: PyBuffer<f32>,
    pub(super) min_p: PyBuffer<f32>,
    pub(super) repetition_penalty: PyBuffer<f32>,
    pub(super) presence_penalty: PyBuffer<f32>,
    pub(super) frequency_penalty: PyBuffer<f32>,
    pub(super) uniform: PyBuffer<f32>,
    pub(super) logprobs: PyBuffer<i32>,
    pub(super) sampled: PyBuffer<i32>,
    pub(super) sampled_logprob: PyBuffer<f32>,
    pub(super) top_ids: PyBuffer<i32>,
    pub(super) top_logprobs: PyBuffer<f32>,
    pub(super) state_from: PyBuffer<i32>,
    pub(super) state_to: PyBuffer<i32>,
    pub(super) state_tokens: PyBuffer<i32>,
    pub(super) copied_blocks: PyBuffer<i32>,
    pub(super) adapters: PyBuffer<i32>,
    pub(super) window_slots: PyBuffer<i32>,
    pub(super) window_tables: PyBuffer<i32>,
}

impl StepBuffers {
    /// The arrays of a `StepBuffers`, which must be writable and contiguous.
    pub(super) fn new(source: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self {
            token_ids: buffer(source, "token_ids")?,
            positions: buffer(source, "positions")?,
            slots: buffer(source, "slots")?,
            query_start: buffer(source, "query_start")?,
            context_lens: buffer(source, "context_lens")?,
            block_tables: buffer(source, "block_tables")?,
            sample_rows: buffer(source, "sample_rows")?,
            next_tokens: buffer(source, "next_tokens")?,
            drafts: buffer(source, "drafts")?,
            temperature: buffer(source, "temperature")?,
            top_k: buffer(source, "top_k")?,
            top_p: buffer(source, "top_p")?,
            min_p: buffer(source, "min_p")?,
            repetition_penalty: buffer(source, "repetition_penalty")?,
            presence_penalty: buffer(source, "presence_penalty")?,
            frequency_penalty: buffer(source, "frequency_penalty")?,
            uniform: buffer(source, "uniform")?,
            logprobs: buffer(source, "logprobs")?,
            sampled: buffer(source, "sampled")?,
            sampled_logprob: buffer(source, "sampled_logprob")?,
            top_ids: buffer(source, "top_ids")?,
            top_logprobs: buffer(source, "top_logprobs")?,
            state_from: buffer(source, "state_from")?,
            state_to: buffer(source, "state_to")?,
            state_tokens: buffer(source, "state_tokens")?,
            copied_blocks: buffer(source, "copied_blocks")?,
            adapters: buffer(source, "adapters")?,
            window_slots: buffer(source, "window_slots")?,
            window_tables: buffer(source, "window_tables")?,
        })
    }
}

fn buffer<T: Element>(object: &Bound<'_, PyAny>, name: &str) -> PyResult<PyBuffer<T>> {
    let buffer = PyBuffer::get(&object.getattr(name)?)?;
    if buffer.readonly() || !buffer.is_c_contiguous() {
        let message = format!("StepBuffers.{name} must be writable and C-contiguous");
        return Err(pyo3::exceptions::PyValueError::new_err(message));
    }
    Ok(buffer)
}
