//! `_core.CpuModel` and `_core.CpuProgram`: the native decoder that `lmserve/model/cpu_ops.py` records its programs for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::cpu_arrays::{CpuArrays, MaskWords, sample_extras, token_masks, values};
use super::cpu_weights::{GivenPart, StoredPart};
use crate::cpu::attention::{KvShape, KvType, PAGE};
use crate::cpu::sample::{SampleExtras, TokenMasks};
use crate::cpu::{Isa, Model, ModelShape, Program, StepSampling};
use crate::error::{Error, Result};

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
        parts: Vec<GivenPart<'_>>,
        quantize: Option<&str>,
    ) -> PyResult<usize> {
        let parts: Vec<_> = parts
            .into_iter()
            .map(|part| StoredPart::new(part, quantize))
            .collect::<PyResult<_>>()?;
        let matrices: Vec<_> = parts
            .iter()
            .map(StoredPart::matrix)
            .collect::<Result<_>>()?;
        Ok(py.detach(|| lock(&self.0).add_linear(&matrices))?)
    }

    /// Takes the weight of an RMS norm; gives its number.
    fn add_norm(&self, weight: &Bound<'_, PyAny>) -> PyResult<usize> {
        // Read first: Python may give up the GIL while it hands an array over.
        let weight = values(weight)?;
        Ok(lock(&self.0).add_norm(weight))
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
        let bytes = py.detach(|| {
            let model = lock(&self.0);
            let values = model.logits().get(..n_rows * model.vocab_size());
            values.map(|values| -> Vec<u8> {
                let bytes = values.iter().flat_map(|value| value.to_ne_bytes());
                bytes.collect()
            })
        });
        let bytes = bytes
            .ok_or_else(|| Error::internal(format!("the last step had less than {n_rows} rows")))?;
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
        contained(|| {
            let (mut model, program) = (lock(&self.0), lock(&program.0));
            // SAFETY: the engine fills the arrays before this call, and touches them again after it; other calls wait for the
            // model.
            let (step, rows, out) = unsafe { arrays.step(n_tokens, n_seqs, n_rows)? };
            let sampling = StepSampling {
                rows,
                extras,
                masks: masks.map(|masks| masks as &dyn TokenMasks),
                out,
            };
            model.run(&program, head, &step, &sampling)
        })
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
