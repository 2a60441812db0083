//! The arrays and masks that a step on the CPU reads and writes.

use std::sync::{Arc, OnceLock};

use pyo3::buffer::{Element, PyBuffer};
use pyo3::prelude::*;

use super::masks::StepMasks;
use super::step_buffers::StepBuffers;
use crate::cpu::sample::{LogitEdits, SampleRows, Sampled, TokenMasks};
use crate::cpu::{SharedSlice, StepInput};
use crate::error::{Error, Result};
use crate::guided;

/// The arrays of a `StepBuffers`, taken once.
#[pyclass(frozen, module = "lmserve._core")]
pub(super) struct CpuArrays(StepBuffers);

#[pymethods]
impl CpuArrays {
    #[new]
    fn new(buffers: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(StepBuffers::new(buffers)?))
    }
}

/// What a step reads, how its rows are sampled, and where that and the guesses go.
type StepArrays<'a> = (
    StepInput<'a>,
    SampleRows<'a>,
    Sampled<'a>,
    SharedSlice<'a, i32>,
);

impl CpuArrays {
    /// A step of so many tokens, sequences and sampled rows.
    ///
    /// # Safety
    /// Nobody else may touch the arrays while the values are in use.
    pub(super) unsafe fn step(
        &self,
        n_tokens: usize,
        n_seqs: usize,
        n_rows: usize,
    ) -> Result<StepArrays<'_>> {
        let b = &self.0;
        let stride = b.block_tables.shape().get(1).copied().unwrap_or(0);
        // SAFETY: the caller's promise.
        unsafe {
            let step = StepInput {
                token_ids: entries(&b.token_ids, n_tokens)?,
                positions: entries(&b.positions, n_tokens)?,
                places: &[],
                slots: entries(&b.slots, n_tokens)?,
                query_start: entries(&b.query_start, n_seqs + 1)?,
                context_lens: entries(&b.context_lens, n_seqs)?,
                block_tables: entries(&b.block_tables, n_seqs * stride)?,
                stride,
                window_slots: entries(&b.window_slots, n_tokens.min(b.window_slots.item_count()))?,
                window_tables: entries(
                    &b.window_tables,
                    (n_seqs * stride).min(b.window_tables.item_count()),
                )?,
                sample_rows: entries(&b.sample_rows, n_rows)?,
                next_tokens: entries(&b.next_tokens, n_seqs.min(b.next_tokens.item_count()))?,
                state_from: entries(&b.state_from, n_seqs.min(b.state_from.item_count()))?,
                state_to: entries(&b.state_to, n_seqs.min(b.state_to.item_count()))?,
                state_tokens: entries(&b.state_tokens, n_seqs.min(b.state_tokens.item_count()))?,
                adapters: entries(&b.adapters, n_seqs.min(b.adapters.item_count()))?,
                copied_blocks: entries(&b.copied_blocks, n_seqs.min(b.copied_blocks.item_count()))?,
            };
            let rows = SampleRows {
                temperature: entries(&b.temperature, n_rows)?,
                top_k: entries(&b.top_k, n_rows)?,
                top_p: entries(&b.top_p, n_rows)?,
                min_p: entries(&b.min_p, n_rows)?,
                repetition_penalty: entries(&b.repetition_penalty, n_rows)?,
                presence_penalty: entries(&b.presence_penalty, n_rows)?,
                frequency_penalty: entries(&b.frequency_penalty, n_rows)?,
                uniform: entries(&b.uniform, n_rows)?,
                logprobs: entries(&b.logprobs, n_rows)?,
            };
            let out = Sampled {
                tokens: results(&b.sampled, n_rows)?,
                logprobs: results(&b.sampled_logprob, n_rows)?,
                top_ids: results(&b.top_ids, b.top_ids.item_count())?,
                top_logprobs: results(&b.top_logprobs, b.top_logprobs.item_count())?,
            };
            let drafts = results(&b.drafts, n_rows.min(b.drafts.item_count()))?;
            Ok((step, rows, out, drafts))
        }
    }
}

/// The values of an array.
pub(super) fn values<T: Element>(object: &Bound<'_, PyAny>) -> PyResult<Vec<T>> {
    PyBuffer::<T>::get(object)?.to_vec(object.py())
}

/// The first `len` entries of a step's array.
///
/// # Safety
/// Nobody may write the array while the slice is in use.
pub(super) unsafe fn entries<T: Element>(buffer: &PyBuffer<T>, len: usize) -> Result<&[T]> {
    check_len(buffer, len)?;
    // SAFETY: the array is contiguous and has the entries; the caller keeps writers away.
    Ok(unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<T>().cast_const(), len) })
}

/// The first `len` entries of an array of results.
///
/// # Safety
/// Nobody else may touch the array while the value is in use.
unsafe fn results<T: Element>(buffer: &PyBuffer<T>, len: usize) -> Result<SharedSlice<'_, T>> {
    check_len(buffer, len)?;
    // SAFETY: the array is writable and contiguous, has the entries, and the caller keeps everyone else away.
    Ok(unsafe { SharedSlice::from_raw(buffer.buf_ptr().cast(), len) })
}

fn check_len<T: Element>(buffer: &PyBuffer<T>, len: usize) -> Result<()> {
    if len <= buffer.item_count() {
        return Ok(());
    }
    let given = buffer.item_count();
    Err(Error::internal(format!(
        "the step needs {len} entries of an array that has {given}"
    )))
}

/// The masks of a step's rows; their words are asked for as late as possible, for they are computed while the model runs.
pub(super) struct MaskWords {
    rows: Vec<usize>,
    masks: Arc<guided::StepMasks>,
    words: OnceLock<Vec<u32>>,
}

impl MaskWords {
    pub(super) fn new(masks: &Arc<guided::StepMasks>) -> Self {
        Self {
            rows: masks.rows().collect(),
            masks: Arc::clone(masks),
            words: OnceLock::new(),
        }
    }
}

impl TokenMasks for MaskWords {
    fn rows(&self) -> &[usize] {
        &self.rows
    }

    fn wait(&self) -> &[u32] {
        self.words.get_or_init(|| {
            self.masks.wait();
            let bytes = self.masks.to_bytes();
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|&word| u32::from_ne_bytes(word))
                .collect()
        })
    }
}

pub(super) fn token_masks(edits: &Bound<'_, PyAny>) -> PyResult<Option<MaskWords>> {
    let masks: Option<PyRef<'_, StepMasks>> = edits.getattr("masks")?.extract()?;
    Ok(masks.map(|masks| MaskWords::new(&masks.0)))
}

pub(super) fn logit_edits(edits: &Bound<'_, PyAny>) -> PyResult<LogitEdits> {
    Ok(LogitEdits {
        bias_start: values(&edits.getattr("bias_start")?)?,
        bias_token: values(&edits.getattr("bias_token")?)?,
        bias_value: values(&edits.getattr("bias_value")?)?,
        seen_start: values(&edits.getattr("seen_start")?)?,
        seen_token: values(&edits.getattr("seen_token")?)?,
        seen_count: values(&edits.getattr("seen_count")?)?,
    })
}
