//! `_core.CpuModel` and `_core.CpuProgram`: the native decoder that `lmserve/model/cpu_ops.py` records its programs for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use pyo3::buffer::{Element, PyBuffer};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::executor::Buffers;
use super::masks::StepMasks;
use crate::cpu::attention::{KvShape, KvType, PAGE};
use crate::cpu::linear::packed_bytes;
use crate::cpu::sample::{SampleExtras, SampleRows, Sampled, TokenMasks};
use crate::cpu::{
    BlockType, FloatType, Format, Isa, Matrix, Model, ModelShape, Program, Shared, StepInput,
    StepSampling, Stored,
};
use crate::error::{Error, Result};
use crate::guided;

/// A recorded list of operations.
#[pyclass(frozen, module = "lmserve._core")]
pub(super) struct CpuProgram(Mutex<Program>);

#[pymethods]
impl CpuProgram {
    #[new]
    fn new() -> Self {
        Self(Mutex::default())
    }
}

/// A decoder with its weights and KV cache.
#[pyclass(frozen, module = "lmserve._core")]
pub(super) struct CpuModel(Mutex<Model>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kv_type(name: &str) -> Result<KvType> {
    match name {
        "fp32" => Ok(KvType::F32),
        "fp16" => Ok(KvType::F16),
        "int8" => Ok(KvType::I8),
        _ => Err(Error::invalid(
            "kv_dtype",
            format!("must be fp32, fp16 or int8, but {name} was given"),
        )),
    }
}

/// How a type is stored and kept: GGUF's blocks as they are, unless they are to be rounded.
fn storage(dtype: &str, quantize: Option<&str>) -> Result<Stored> {
    if quantize.is_none()
        && let Some(block) = BlockType::from_name(dtype)
    {
        return Ok(Stored::Blocks(block));
    }
    let float = match dtype {
        "F16" => FloatType::F16,
        "BF16" => FloatType::Bf16,
        _ => FloatType::F32,
    };
    let format = match (quantize, dtype) {
        (Some("q8"), _) => Format::Int8,
        (Some("q4"), _) => Format::Int4,
        (Some("none"), _) | (None, "F32") => Format::F32,
        (None, "F16") => Format::F16,
        (None, "BF16") => Format::Bf16,
        _ => {
            let given = quantize.unwrap_or(dtype);
            return Err(Error::invalid(
                "quantize",
                format!("weights are kept as q8, q4 or none, but {given} was given"),
            ));
        }
    };
    Ok(Stored::Floats(float, format))
}

/// Bytes of a packed linear layer of this shape.
#[pyfunction]
pub(super) fn cpu_linear_bytes(
    stored: &str,
    quantize: Option<&str>,
    rows: usize,
    columns: usize,
) -> Result<usize> {
    Ok(packed_bytes(storage(stored, quantize)?, rows, columns))
}

/// Bytes that a token takes in the KV cache of all layers.
#[pyfunction]
pub(super) fn cpu_kv_bytes_per_token(
    kv_dtype: &str,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
) -> Result<usize> {
    let shape = KvShape {
        dtype: kv_type(kv_dtype)?,
        kv_heads,
        head_dim,
    };
    Ok(layers * shape.page_bytes() / PAGE)
}

/// The values of an array.
fn values<T: Element>(object: &Bound<'_, PyAny>) -> PyResult<Vec<T>> {
    PyBuffer::<T>::get(object)?.to_vec(object.py())
}

/// The first `len` entries of a step's array.
///
/// # Safety
/// Nobody may write the array while the slice is in use.
unsafe fn entries<T: Element>(buffer: &PyBuffer<T>, len: usize) -> Result<&[T]> {
    check_len(buffer, len)?;
    // SAFETY: the array is contiguous and has the entries; the caller keeps writers away.
    Ok(unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<T>().cast_const(), len) })
}

/// The first `len` entries of an array of results.
///
/// # Safety
/// Nobody else may touch the array while the value is in use.
unsafe fn results<T: Element>(buffer: &PyBuffer<T>, len: usize) -> Result<Shared<'_, T>> {
    check_len(buffer, len)?;
    // SAFETY: the array is writable and contiguous, has the entries, and the caller keeps everyone else away.
    Ok(unsafe { Shared::from_raw(buffer.buf_ptr().cast(), len) })
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

/// (type, bytes, rows, columns, bias) of a stored weight.
type StoredPart<'py> = (
    String,
    Bound<'py, PyAny>,
    usize,
    usize,
    Option<Bound<'py, PyAny>>,
);

#[pymethods]
impl CpuModel {
    #[new]
    #[pyo3(signature = (*, vocab_size, heads, kv_heads, head_dim, layers, rms_norm_eps, kv_dtype, block_size, num_blocks, threads, cos, sin, isa))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        vocab_size: usize,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        layers: usize,
        rms_norm_eps: f32,
        kv_dtype: &str,
        block_size: usize,
        num_blocks: usize,
        threads: usize,
        cos: &Bound<'_, PyAny>,
        sin: &Bound<'_, PyAny>,
        isa: Option<&str>,
    ) -> PyResult<Self> {
        let kv = KvShape {
            dtype: kv_type(kv_dtype)?,
            kv_heads,
            head_dim,
        };
        let shape = ModelShape {
            vocab_size,
            heads,
            layers,
            rms_norm_eps,
            kv,
            block_size,
            num_blocks,
        };
        let (cos, sin) = (values(cos)?, values(sin)?);
        Ok(Self(Mutex::new(Model::new(
            Isa::choose(isa)?,
            threads,
            shape,
            cos,
            sin,
        )?)))
    }

    /// Such as `avx512`.
    #[getter]
    fn isa(&self) -> &'static str {
        lock(&self.0).isa().name()
    }

    #[getter]
    fn weight_bytes(&self) -> usize {
        lock(&self.0).weight_bytes()
    }

    /// Packs stored weights side by side, each (dtype, bytes, rows, columns, bias); gives the layer's number.
    #[pyo3(signature = (parts, quantize=None))]
    fn add_linear(
        &self,
        py: Python<'_>,
        parts: Vec<StoredPart<'_>>,
        quantize: Option<&str>,
    ) -> PyResult<usize> {
        let mut kinds = Vec::new();
        let mut buffers = Vec::new();
        for (dtype, bytes, rows, columns, bias) in parts {
            kinds.push((storage(&dtype, quantize)?, rows, columns));
            let bias = bias.as_ref().map(values::<f32>).transpose()?;
            buffers.push((PyBuffer::<u8>::get(&bytes)?, bias));
        }
        let mut matrices = Vec::new();
        for ((stored, rows, columns), (buffer, bias)) in kinds.into_iter().zip(&buffers) {
            if !buffer.is_c_contiguous() {
                return Err(Error::invalid("model", "a weight must lie in one piece").into());
            }
            matrices.push(Matrix {
                stored,
                rows,
                columns,
                // SAFETY: the caller keeps the array, which nobody writes, until this returns.
                bytes: unsafe { entries(buffer, buffer.item_count())? },
                bias: bias.as_deref(),
            });
        }
        Ok(py.detach(|| lock(&self.0).add_linear(&matrices))?)
    }

    /// Takes the weight of an RMS norm; gives its number.
    fn add_norm(&self, weight: &Bound<'_, PyAny>) -> PyResult<usize> {
        Ok(lock(&self.0).add_norm(values(weight)?))
    }

    fn embed(&self, program: &CpuProgram, weight: usize) -> Result<usize> {
        lock(&self.0).record_embed(&mut lock(&program.0), weight)
    }

    fn rms_norm(&self, program: &CpuProgram, x: usize, weight: usize, eps: f32) -> Result<usize> {
        lock(&self.0).record_rms_norm(&mut lock(&program.0), x, weight, eps)
    }

    fn add_rms_norm(
        &self,
        program: &CpuProgram,
        x: usize,
        residual: usize,
        weight: usize,
        eps: f32,
    ) -> Result<usize> {
        lock(&self.0).record_add_rms_norm(&mut lock(&program.0), (x, residual), weight, eps)
    }

    fn linear(&self, program: &CpuProgram, x: usize, weight: usize) -> Result<usize> {
        lock(&self.0).record_linear(&mut lock(&program.0), x, weight)
    }

    #[pyo3(signature = (program, qkv, layer, norms=None))]
    fn rope_and_cache(
        &self,
        program: &CpuProgram,
        qkv: usize,
        layer: usize,
        norms: Option<(usize, usize)>,
    ) -> Result<usize> {
        lock(&self.0).record_rope_and_cache(&mut lock(&program.0), qkv, layer, norms)
    }

    fn attention(&self, program: &CpuProgram, queries: usize, layer: usize) -> Result<usize> {
        lock(&self.0).record_attention(&mut lock(&program.0), queries, layer)
    }

    fn silu_mul(&self, program: &CpuProgram, x: usize) -> Result<usize> {
        lock(&self.0).record_silu_mul(&mut lock(&program.0), x)
    }

    fn rows(&self, program: &CpuProgram, x: usize) -> Result<usize> {
        lock(&self.0).record_rows(&mut lock(&program.0), x)
    }

    fn finish(&self, program: &CpuProgram, x: usize) -> Result<()> {
        lock(&self.0).record_result(&mut lock(&program.0), x)
    }

    /// Runs a step over the arrays, without the GIL, and samples its rows from the logits that `head` gives.
    #[pyo3(signature = (program, head, arrays, n_tokens, n_seqs, n_rows, extras=None))]
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        py: Python<'_>,
        program: &CpuProgram,
        head: usize,
        arrays: &CpuArrays,
        n_tokens: usize,
        n_seqs: usize,
        n_rows: usize,
        extras: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let masks = extras.map(token_masks).transpose()?.flatten();
        let extras = extras.map(sample_extras).transpose()?;
        let sizes = (n_tokens, n_seqs, n_rows);
        let outcome = py.detach(|| {
            self.step(
                program,
                head,
                arrays,
                sizes,
                extras.as_ref(),
                masks.as_ref(),
            )
        });
        Ok(outcome?)
    }

    /// The logits of the last step's rows, float32 row after row; changed where a row had a temperature or extras.
    fn logits<'py>(&self, py: Python<'py>, n_rows: usize) -> PyResult<Bound<'py, PyBytes>> {
        let model = lock(&self.0);
        let values = model.logits().get(..n_rows * model.vocab_size());
        let values = values
            .ok_or_else(|| Error::internal(format!("the last step had less than {n_rows} rows")))?;
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_ne_bytes())
            .collect();
        Ok(PyBytes::new(py, &bytes))
    }

    /// Embeddings of whole texts, float32 row after row; without the GIL.
    fn embed_texts<'py>(
        &self,
        py: Python<'py>,
        program: &CpuProgram,
        token_ids: &Bound<'py, PyAny>,
        cu_seqlens: &Bound<'py, PyAny>,
        max_tokens: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (tokens, bounds) = (values::<i32>(token_ids)?, values::<i32>(cu_seqlens)?);
        let bytes = py.detach(|| {
            let vectors =
                contained(|| lock(&self.0).embed(&lock(&program.0), &tokens, &bounds, max_tokens))?;
            Ok::<_, Error>(
                vectors
                    .iter()
                    .flat_map(|x| x.to_ne_bytes())
                    .collect::<Vec<u8>>(),
            )
        })?;
        Ok(PyBytes::new(py, &bytes))
    }
}

impl CpuModel {
    /// Runs a step of so many tokens, sequences and sampled rows over the arrays, which nobody else may touch meanwhile.
    pub(super) fn step(
        &self,
        program: &CpuProgram,
        head: usize,
        arrays: &CpuArrays,
        (n_tokens, n_seqs, n_rows): (usize, usize, usize),
        extras: Option<&SampleExtras>,
        masks: Option<&MaskWords>,
    ) -> Result<()> {
        let b = &arrays.0;
        let stride = b.block_tables.shape().get(1).copied().unwrap_or(0);
        // SAFETY: the engine fills the arrays before this call, and touches them again after it.
        let (step, rows, out) = unsafe {
            let step = StepInput {
                token_ids: entries(&b.token_ids, n_tokens)?,
                positions: entries(&b.positions, n_tokens)?,
                slots: entries(&b.slots, n_tokens)?,
                query_start: entries(&b.query_start, n_seqs + 1)?,
                context_lens: entries(&b.context_lens, n_seqs)?,
                block_tables: entries(&b.block_tables, n_seqs * stride)?,
                stride,
                sample_rows: entries(&b.sample_rows, n_rows)?,
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
            (step, rows, out)
        };
        let sampling = StepSampling {
            rows,
            extras,
            masks: masks.map(|masks| masks as &dyn TokenMasks),
            out,
        };
        contained(|| lock(&self.0).run(&lock(&program.0), head, &step, &sampling))
    }
}

/// A fault of the kernels as an error: a panic that reached the engine's thread would take the engine down.
fn contained<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("it panicked");
        Err(Error::internal(format!("the CPU model failed: {text}")))
    })
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

fn token_masks(extras: &Bound<'_, PyAny>) -> PyResult<Option<MaskWords>> {
    let masks: Option<PyRef<'_, StepMasks>> = extras.getattr("masks")?.extract()?;
    Ok(masks.map(|masks| MaskWords::new(&masks.0)))
}

fn sample_extras(extras: &Bound<'_, PyAny>) -> PyResult<SampleExtras> {
    Ok(SampleExtras {
        bias_start: values(&extras.getattr("bias_start")?)?,
        bias_token: values(&extras.getattr("bias_token")?)?,
        bias_value: values(&extras.getattr("bias_value")?)?,
        seen_start: values(&extras.getattr("seen_start")?)?,
        seen_token: values(&extras.getattr("seen_token")?)?,
        seen_count: values(&extras.getattr("seen_count")?)?,
    })
}

/// The arrays of a `StepBuffers`, taken once.
#[pyclass(frozen, module = "lmserve._core")]
pub(super) struct CpuArrays(Buffers);

#[pymethods]
impl CpuArrays {
    #[new]
    fn new(buffers: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(Buffers::new(buffers)?))
    }
}
