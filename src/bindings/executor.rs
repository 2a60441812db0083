//! A model loop in Python as the engine's [`Executor`]: the step's arrays are written into the runner's own buffers, so that one
//! call is all that crosses the border.

use std::ptr::{self, NonNull};

use pyo3::buffer::{Element, PyBuffer};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes};

use super::cpu_executor::CpuStep;
use super::masks::StepMasks;
use super::step_buffers::{StepBuffers, bytes_of};
use crate::engine::{Executor, MEMORY_LOST, StepOutput, WORKER_UNAVAILABLE};
use crate::error::{Error, Kind, Result};
use crate::kv::Place;
use crate::sched::Step;

/// Seconds after which a client may ask again for what a process that is down could not compute.
const RETRY_AFTER: u32 = 2;

/// Drives an object with the methods of `Runner` in `lmserve/model/interface.py`.
pub(super) struct PyExecutor {
    launch: Py<PyAny>,
    collect: Py<PyAny>,
    embed: Py<PyAny>,
    /// Of a runner that computes long texts in several passes.
    embed_passes: Option<Py<PyAny>>,
    /// What it has begun.
    passes: Option<Py<PyAny>>,
    /// `save` and `load` of a runner whose memory can be copied.
    copies: Option<(Py<PyAny>, Py<PyAny>)>,
    edits: Py<PyAny>,
    frombuffer: Py<PyAny>,
    /// Takes the place of `launch` and `collect` where the runner has it.
    native: Option<CpuStep>,
    buffers: StepBuffers,
    /// One sequence's block ids as the runner's integers; reused.
    block_row: Vec<i32>,
}

/// Copies `values` into `buffer` from `offset` on.
fn put<T: Element>(buffer: &PyBuffer<T>, offset: usize, values: &[T], name: &str) -> Result<()> {
    let cells = buffer.as_slice_ptr();
    let (end, capacity) = (offset + values.len(), cells.map_or(0, NonNull::len));
    let Some(cells) = cells.filter(|_| end <= capacity) else {
        return Err(Error::internal(format!(
            "the step needs {end} entries of {name}, but the runner gave {capacity}"
        )));
    };
    // SAFETY: offset..end lies within the buffer, which `buffer` checked to be writable and keeps alive; a runner touches its
    // buffers only within `launch` and `collect`, which are called from this thread alone.
    unsafe {
        ptr::copy_nonoverlapping(
            values.as_ptr(),
            cells.cast::<T>().as_ptr().add(offset),
            values.len(),
        );
    };
    Ok(())
}

fn get<T: Element>(buffer: &PyBuffer<T>, offset: usize, count: usize) -> Result<Vec<T>> {
    let cells = buffer
        .as_slice_ptr()
        .filter(|cells| offset + count <= cells.len());
    let cells =
        cells.ok_or_else(|| Error::internal("an output buffer of the runner is too small"))?;
    // SAFETY: as in `put`.
    let values =
        unsafe { std::slice::from_raw_parts(cells.cast::<T>().as_ptr().add(offset), count) };
    Ok(values.to_vec())
}

fn failed(py: Python<'_>, error: &PyErr) -> Error {
    let code = error.value(py).getattr("code");
    let code = code.and_then(|code| code.extract::<String>());
    if let Ok(code) = code
        && let Some(known) = [MEMORY_LOST, WORKER_UNAVAILABLE]
            .into_iter()
            .find(|known| *known == code)
    {
        return Error::new(Kind::Unavailable, known, error.value(py).to_string())
            .with_detail("retry_after", RETRY_AFTER);
    }
    error.display(py);
    Error::internal(format!("the model failed: {error}"))
}

impl PyExecutor {
    pub(super) fn new(runner: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = runner.py();
        let source = runner.getattr("buffers")?;
        let buffers = StepBuffers::new(&source)?;
        Ok(Self {
            launch: runner.getattr("launch")?.unbind(),
            collect: runner.getattr("collect")?.unbind(),
            embed: runner.getattr("embed")?.unbind(),
            embed_passes: runner.getattr_opt("embed_passes")?.map(Bound::unbind),
            passes: None,
            copies: match (runner.getattr_opt("save")?, runner.getattr_opt("load")?) {
                (Some(save), Some(load)) => Some((save.unbind(), load.unbind())),
                _ => None,
            },
            edits: py
                .import("lmserve.model.interface")?
                .getattr("LogitEdits")?
                .getattr("from_bytes")?
                .unbind(),
            frombuffer: py.import("numpy")?.getattr("frombuffer")?.unbind(),
            native: CpuStep::of(runner)?,
            buffers,
            block_row: Vec::new(),
        })
    }

    /// Rows that the runner can sample in a step.
    pub(super) fn max_rows(&self) -> usize {
        self.buffers.sample_rows.item_count()
    }

    /// Whether the model guesses what follows the tokens that it samples.
    pub(super) fn guesses(&self) -> bool {
        self.buffers.drafts.item_count() > 0
    }

    /// Calls `embed` or `embed_passes` with what is embedded.
    fn call_embed<'py>(
        &self,
        method: &Py<PyAny>,
        py: Python<'py>,
        token_ids: &[i32],
        cu_seqlens: &[i32],
    ) -> PyResult<Bound<'py, PyAny>> {
        let array = |values: &[i32]| {
            let bytes = PyByteArray::new(py, &bytes_of(values, i32::to_ne_bytes));
            self.frombuffer.bind(py).call1((bytes, "int32"))
        };
        let given = (array(token_ids)?, array(cu_seqlens)?);
        method.bind(py).call1(given)
    }

    fn write(&mut self, step: &Step) -> Result<()> {
        let b = &self.buffers;
        put(&b.token_ids, 0, &step.token_ids, "token_ids")?;
        put(&b.positions, 0, &step.positions, "positions")?;
        put(&b.slots, 0, &step.slots, "slots")?;
        put(&b.query_start, 0, &step.query_start, "query_start")?;
        put(&b.context_lens, 0, &step.context_lens, "context_lens")?;
        put(&b.sample_rows, 0, &step.sample_rows, "sample_rows")?;
        put(&b.temperature, 0, &step.temperature, "temperature")?;
        put(&b.top_k, 0, &step.top_k, "top_k")?;
        put(&b.top_p, 0, &step.top_p, "top_p")?;
        put(&b.min_p, 0, &step.min_p, "min_p")?;
        put(
            &b.repetition_penalty,
            0,
            &step.repetition_penalty,
            "repetition_penalty",
        )?;
        put(
            &b.presence_penalty,
            0,
            &step.presence_penalty,
            "presence_penalty",
        )?;
        put(
            &b.frequency_penalty,
            0,
            &step.frequency_penalty,
            "frequency_penalty",
        )?;
        put(&b.uniform, 0, &step.uniform, "uniform")?;
        put(&b.logprobs, 0, &step.logprobs, "logprobs")?;
        put(&b.state_from, 0, &step.state_from, "state_from")?;
        put(&b.state_to, 0, &step.state_to, "state_to")?;
        put(&b.state_tokens, 0, &step.state_tokens, "state_tokens")?;
        put(&b.copied_blocks, 0, &step.copied_blocks, "copied_blocks")?;
        if b.adapters.item_count() > 0 || step.adapters.iter().any(|&adapter| adapter > 0) {
            put(&b.adapters, 0, &step.adapters, "adapters")?;
        }
        put(&b.window_slots, 0, &step.window_slots, "window_slots")?;
        if self.guesses() {
            put(&b.next_tokens, 0, &step.next_tokens, "next_tokens")?;
        }
        let stride = b.block_tables.shape().get(1).copied().unwrap_or(0);
        for (at, blocks) in step.block_tables.iter().enumerate() {
            if blocks.len() > stride {
                let needed = blocks.len();
                return Err(Error::internal(format!(
                    "a sequence has {needed} blocks; the runner has room for {stride}"
                )));
            }
            self.block_row.clear();
            self.block_row
                .extend(blocks.iter().map(|&block| block as i32));
            put(
                &b.block_tables,
                at * stride,
                &self.block_row,
                "block_tables",
            )?;
        }
        for (at, window) in step.window_tables.iter().enumerate() {
            let own = window.blocks.iter().map(|&block| block as i32);
            let first = own.clone().next().unwrap_or(0);
            self.block_row.clear();
            self.block_row.resize(window.first, first);
            self.block_row.extend(own);
            put(
                &b.window_tables,
                at * stride,
                &self.block_row,
                "window_tables",
            )?;
        }
        Ok(())
    }

    fn make_logit_edits<'py>(&self, py: Python<'py>, step: &Step) -> PyResult<Bound<'py, PyAny>> {
        if !step.has_logit_edits() {
            return Ok(py.None().into_bound(py));
        }
        let ints = |values: &[i32]| PyByteArray::new(py, &bytes_of(values, i32::to_ne_bytes));
        let floats = |values: &[f32]| PyByteArray::new(py, &bytes_of(values, f32::to_ne_bytes));
        self.edits.bind(py).call1((
            ints(&step.bias_start),
            ints(&step.bias_token),
            floats(&step.bias_value),
            ints(&step.seen_start),
            ints(&step.seen_token),
            ints(&step.seen_count),
            StepMasks::of(step),
        ))
    }
}

/// The slot and the block of a place.
const fn parts(place: Place) -> (Option<u32>, Option<u32>) {
    match place {
        Place::Block(block) => (None, Some(block)),
        Place::State { slot, tail_block } => (Some(slot), tail_block),
    }
}

fn no_copies() -> Error {
    Error::internal("the runner's memory cannot be copied")
}

impl Executor for PyExecutor {
    fn launch(&mut self, step: &Step) -> Result<()> {
        self.write(step)?;
        if let Some(native) = &self.native {
            return native.run(step);
        }
        Python::attach(|py| {
            let sizes = (step.num_tokens(), step.num_sequences(), step.num_rows());
            self.make_logit_edits(py, step)
                .and_then(|edits| {
                    self.launch
                        .bind(py)
                        .call1((sizes.0, sizes.1, sizes.2, edits))
                })
                .map(drop)
                .map_err(|e| failed(py, &e))
        })
    }

    fn collect(&mut self, step: &Step, output: &mut StepOutput) -> Result<()> {
        if self.native.is_none() {
            Python::attach(|py| {
                self.collect
                    .bind(py)
                    .call0()
                    .map(drop)
                    .map_err(|e| failed(py, &e))
            })?;
        }
        let rows = step.num_rows();
        let sampled = get(&self.buffers.sampled, 0, rows)?;
        output.tokens.clear();
        output
            .tokens
            .extend(sampled.iter().map(|&token| token as u32));
        output.guesses = if self.guesses() {
            let guesses = get(&self.buffers.drafts, 0, rows)?;
            guesses.into_iter().map(|token| token as u32).collect()
        } else {
            Vec::new()
        };
        output.logprobs.clear();
        output.top.clear();
        if step.logprobs.iter().all(|&k| k < 0) {
            return Ok(());
        }
        output.logprobs = get(&self.buffers.sampled_logprob, 0, rows)?;
        let stride = self.buffers.top_ids.shape().get(1).copied().unwrap_or(0);
        for (row, &k) in step.logprobs.iter().enumerate() {
            let count = (k.max(0) as usize).min(stride);
            let ids = get(&self.buffers.top_ids, row * stride, count)?;
            let logprobs = get(&self.buffers.top_logprobs, row * stride, count)?;
            output
                .top
                .push(ids.into_iter().map(|id| id as u32).zip(logprobs).collect());
        }
        Ok(())
    }

    fn save(&mut self, place: Place) -> Result<Vec<u8>> {
        if let Some(native) = &self.native {
            return native.save(parts(place));
        }
        let (save, _) = self.copies.as_ref().ok_or_else(no_copies)?;
        Python::attach(|py| {
            let bytes = save.bind(py).call1(parts(place));
            let bytes = bytes.and_then(|bytes| bytes.extract::<Vec<u8>>());
            bytes.map_err(|e| failed(py, &e))
        })
    }

    fn load(&mut self, place: Place, bytes: &[u8]) -> Result<()> {
        if let Some(native) = &self.native {
            return native.load(parts(place), bytes);
        }
        let (_, load) = self.copies.as_ref().ok_or_else(no_copies)?;
        Python::attach(|py| {
            let (slot, block) = parts(place);
            let loaded = load.bind(py).call1((slot, block, PyBytes::new(py, bytes)));
            loaded.map(drop).map_err(|e| failed(py, &e))
        })
    }

    fn embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Vec<f32>> {
        Python::attach(|py| {
            let embed = || floats(&self.call_embed(&self.embed, py, token_ids, cu_seqlens)?);
            embed().map_err(|e| failed(py, &e))
        })
    }

    fn begin_embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Option<Vec<f32>>> {
        let Some(embed_passes) = &self.embed_passes else {
            return self.embed(token_ids, cu_seqlens).map(Some);
        };
        self.passes = Python::attach(|py| {
            self.call_embed(embed_passes, py, token_ids, cu_seqlens)
                .map(|passes| Some(passes.unbind()))
                .map_err(|e| failed(py, &e))
        })?;
        self.go_on_embedding()
    }

    fn go_on_embedding(&mut self) -> Result<Option<Vec<f32>>> {
        let Some(passes) = self.passes.take() else {
            return Err(Error::internal("no text was begun"));
        };
        Python::attach(|py| {
            let pass = || {
                let found = passes.bind(py).call_method0("__next__")?;
                if found.is_none() {
                    return Ok(None);
                }
                floats(&found).map(Some)
            };
            let found = pass().map_err(|e| failed(py, &e))?;
            self.passes = found.is_none().then_some(passes);
            Ok(found)
        })
    }
}

fn floats(vectors: &Bound<'_, PyAny>) -> PyResult<Vec<f32>> {
    PyBuffer::<f32>::get(vectors)?.to_vec(vectors.py())
}
