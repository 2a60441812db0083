//! `_core.CpuModel` and `_core.CpuProgram`: the native decoder that `lmserve/model/cpu_ops.py` records its programs for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::cpu_arrays::{CpuArrays, MaskWords, logit_edits, token_masks, values};
use super::cpu_experts::{GivenExpert, GivenRouter, StoredExpert};
use super::cpu_weights::{GivenPart, StoredPart};
use crate::cpu::attention::{AttentionShape, KvShape, KvType, PAGE};
use crate::cpu::sample::{LogitEdits, TokenMasks};
use crate::cpu::{
    Activation, ConvGate, EmbedPasses, ExpertNumbers, Isa, LayerShape, LowRank, Matrix, Model,
    ModelShape, Pooling, PositionTables, Program, RecurrentShape, ScanRule, StepSampling, Texts,
};
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

/// Texts on their way to embeddings; `None` once they are there.
#[pyclass(frozen, module = "lmserve._core")]
pub(super) struct CpuTexts(Mutex<Option<EmbedPasses>>);

#[pymethods]
impl CpuTexts {
    #[new]
    #[pyo3(signature = (token_ids, cu_seqlens, max_tokens, pooling, separator=None))]
    fn new(
        token_ids: &Bound<'_, PyAny>,
        cu_seqlens: &Bound<'_, PyAny>,
        max_tokens: usize,
        pooling: &str,
        separator: Option<(i32, usize)>,
    ) -> PyResult<Self> {
        let texts = Texts {
            token_ids: values::<i32>(token_ids)?,
            cu_seqlens: values::<i32>(cu_seqlens)?,
            separator,
        };
        let passes = EmbedPasses::new(texts, Pooling::named(pooling)?, max_tokens);
        Ok(Self(Mutex::new(Some(passes))))
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

/// The instruction set that the kernels use here, such as `avx512`; `isa` asks for one.
#[pyfunction]
#[pyo3(signature = (isa=None))]
pub(super) fn cpu_isa(isa: Option<&str>) -> Result<&'static str> {
    Ok(Isa::choose(isa)?.name())
}

/// Bytes that a token takes in the KV cache of layers with so many heads of this size, `(kv_heads, head_dim)`.
#[pyfunction]
pub(super) fn cpu_kv_bytes_per_token(kv_dtype: &str, layers: Vec<(usize, usize)>) -> Result<usize> {
    let dtype = kv_type(kv_dtype)?;
    let bytes = |(kv_heads, head_dim)| {
        let shape = KvShape {
            dtype,
            kv_heads,
            head_dim,
        };
        shape.page_bytes()
    };
    Ok(layers.into_iter().map(bytes).sum::<usize>() / PAGE)
}

/// A layer's attention, read off `lmserve.model.config.AttentionLayer`.
#[derive(FromPyObject)]
struct GivenLayer {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    scale: f32,
    window: Option<usize>,
    causal: bool,
    softcap: Option<f32>,
    shares: Option<usize>,
    latent_rank: Option<usize>,
}

impl GivenLayer {
    fn shape(
        &self,
        dtype: KvType,
        (rope, query_scales): (Option<usize>, Option<usize>),
    ) -> LayerShape {
        LayerShape {
            attention: AttentionShape {
                kv: KvShape {
                    dtype,
                    kv_heads: self.num_kv_heads,
                    head_dim: self.head_dim,
                },
                heads: self.num_heads,
                parts: if self.latent_rank.is_some() {
                    AttentionShape::parts_of(self.num_heads)
                } else {
                    1
                },
                window: self.window,
                causal: self.causal,
            },
            scale: self.scale,
            softcap: self.softcap,
            rope,
            query_scales,
            shares: self.shares,
            rank: self.latent_rank,
        }
    }
}

/// A layer's state, read off `lmserve.model.config.RecurrentLayer`.
#[derive(FromPyObject)]
struct GivenState {
    channels: usize,
    kernel: usize,
    heads: usize,
    rows: usize,
    columns: usize,
}

impl From<GivenState> for RecurrentShape {
    fn from(given: GivenState) -> Self {
        Self {
            channels: given.channels,
            kernel: given.kernel,
            heads: given.heads,
            rows: given.rows,
            columns: given.columns,
        }
    }
}

pub(super) fn activation(name: &str, parameters: &[f32]) -> Result<Activation> {
    match (name, parameters) {
        ("silu", []) => Ok(Activation::Silu),
        ("sigmoid", []) => Ok(Activation::Sigmoid),
        ("gelu", []) => Ok(Activation::Gelu),
        ("gelu_tanh", []) => Ok(Activation::GeluTanh),
        ("relu", []) => Ok(Activation::Relu),
        ("relu2", []) => Ok(Activation::ReluSquared),
        ("xielu", &[positive, negative, beta]) => Ok(Activation::Xielu {
            positive,
            negative,
            beta,
        }),
        ("clamped_swiglu", &[alpha, limit]) => Ok(Activation::ClampedSwiglu { alpha, limit }),
        _ => Err(Error::invalid(
            "activation",
            format!(
                "must be silu, sigmoid, gelu, gelu_tanh, relu, relu2, xielu with 3 parameters, or clamped_swiglu with 2, but {name} with {} was given",
                parameters.len()
            ),
        )),
    }
}

#[pymethods]
impl CpuModel {
    #[new]
    #[pyo3(signature = (*, vocab_size, layers, recurrent, state_slots, positions, ropes, query_scales, places, logits_scale, logits_softcap, kv_dtype, block_size, num_blocks, num_window_blocks, threads, isa))]
    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
    fn new(
        vocab_size: usize,
        layers: Vec<GivenLayer>,
        recurrent: Vec<GivenState>,
        state_slots: usize,
        positions: usize,
        ropes: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
        query_scales: Vec<Bound<'_, PyAny>>,
        places: Vec<(Option<usize>, Option<usize>)>,
        logits_scale: Option<f32>,
        logits_softcap: Option<f32>,
        kv_dtype: &str,
        block_size: usize,
        num_blocks: usize,
        num_window_blocks: usize,
        threads: usize,
        isa: Option<&str>,
    ) -> PyResult<Self> {
        let dtype = kv_type(kv_dtype)?;
        let shape = ModelShape {
            vocab_size,
            layers: layers
                .iter()
                .zip(places)
                .map(|(layer, tables)| layer.shape(dtype, tables))
                .collect(),
            recurrent: recurrent.into_iter().map(Into::into).collect(),
            state_slots,
            block_size,
            num_blocks,
            num_window_blocks,
            positions,
            logits_scale,
            logits_softcap,
        };
        let tables = PositionTables {
            ropes: ropes
                .iter()
                .map(|(cos, sin)| Ok((values(cos)?, values(sin)?)))
                .collect::<PyResult<_>>()?,
            query_scales: query_scales.iter().map(values).collect::<PyResult<_>>()?,
        };
        Ok(Self(Mutex::new(Model::new(
            Isa::choose(isa)?,
            threads,
            shape,
            tables,
        )?)))
    }

    /// Such as `avx512`.
    #[getter]
    fn isa(&self) -> &'static str {
        lock(&self.0).isa().name()
    }

    /// Bytes of a block with its keys and values, and of a recurrent state.
    #[getter]
    fn copy_sizes(&self) -> (usize, usize) {
        lock(&self.0).copy_sizes()
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
        self.pack(py, parts, quantize, Model::add_linear)
    }

    /// Takes what adapter `number` adds to a linear layer's outputs from `first` on: float32 `down` [rank, inputs], and
    /// `up` [rank, outputs] times its scale.
    fn add_low_rank(
        &self,
        number: u32,
        weight: usize,
        first: usize,
        rank: usize,
        down: &Bound<'_, PyAny>,
        up: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (down, up) = (values(down)?, values(up)?);
        let part = LowRank {
            first,
            rank,
            down: &down,
            up: &up,
        };
        Ok(lock(&self.0).add_low_rank(number, weight, part)?)
    }

    /// Forgets an adapter.
    fn remove_adapter(&self, number: u32) {
        lock(&self.0).remove_adapter(number);
    }

    /// Takes the weight of an RMS norm, or of a layer norm (`centered`); gives its number. Each of `parts` of a row is
    /// normed by itself.
    #[pyo3(signature = (weight, eps, *, bias=None, centered=false, parts=1))]
    fn add_norm(
        &self,
        weight: &Bound<'_, PyAny>,
        eps: f32,
        bias: Option<&Bound<'_, PyAny>>,
        centered: bool,
        parts: usize,
    ) -> PyResult<usize> {
        let (weight, bias) = (values(weight)?, bias.map(values).transpose()?);
        Ok(lock(&self.0).add_norm(weight, bias, eps, centered, parts)?)
    }

    /// Takes the sinks of a layer's attention; gives their number.
    fn add_sinks(&self, sinks: &Bound<'_, PyAny>) -> PyResult<usize> {
        Ok(lock(&self.0).add_sinks(values(sinks)?))
    }

    /// Takes what attention adds to scores by distance, for each head an odd number of float32, the middle one for distance 0;
    /// gives its number.
    fn add_distances(&self, distances: &Bound<'_, PyAny>, heads: usize) -> PyResult<usize> {
        Ok(lock(&self.0).add_distances(&values(distances)?, heads)?)
    }

    /// Packs matrices of one shape, one for each head, as parts of `add_linear`; gives their number.
    #[pyo3(signature = (parts, quantize=None))]
    fn add_heads(
        &self,
        py: Python<'_>,
        parts: Vec<GivenPart<'_>>,
        quantize: Option<&str>,
    ) -> PyResult<usize> {
        self.pack(py, parts, quantize, Model::add_heads)
    }

    /// Takes a layer's router: its matrix as a part of `add_linear`, and numbers for each expert (or none) that are added to
    /// the scores that choose, and that weights are multiplied with; gives its number.
    fn add_router(
        &self,
        part: GivenPart<'_>,
        router: &Bound<'_, PyAny>,
        correction: Option<&Bound<'_, PyAny>>,
        scale: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let part = StoredPart::new(part, None)?;
        let numbers = ExpertNumbers {
            correction: correction.map(values).transpose()?.unwrap_or_default(),
            scale: scale.map(values).transpose()?.unwrap_or_default(),
        };
        let router: GivenRouter = router.extract()?;
        let (matrix, kind) = (part.matrix()?, router.kind()?);
        let mut model = lock(&self.0);
        Ok(model.add_router(matrix, kind, numbers, router.factor, router.top_k)?)
    }

    /// Makes room for the experts of a layer; gives their number.
    #[pyo3(signature = (name, parameters, *, scaled_inputs))]
    #[allow(clippy::needless_pass_by_value)]
    fn add_experts(&self, name: &str, parameters: Vec<f32>, scaled_inputs: bool) -> Result<usize> {
        let activation = activation(name, &parameters)?;
        Ok(lock(&self.0).add_experts(activation, scaled_inputs))
    }

    /// Packs further experts of a layer, each (gate or None, up, down) as parts of `add_linear`.
    #[pyo3(signature = (number, experts, quantize=None))]
    fn extend_experts(
        &self,
        py: Python<'_>,
        number: usize,
        experts: Vec<GivenExpert<'_>>,
        quantize: Option<&str>,
    ) -> PyResult<()> {
        let experts: Vec<_> = experts
            .into_iter()
            .map(|expert| StoredExpert::new(expert, quantize))
            .collect::<PyResult<_>>()?;
        let matrices: Vec<_> = experts
            .iter()
            .map(StoredExpert::matrices)
            .collect::<Result<_>>()?;
        Ok(py.detach(|| lock(&self.0).extend_experts(number, &matrices))?)
    }

    /// Takes weights from the file of packed weights at `path` from now on. Gives why not, where it must not be used. `check`: all its
    /// bytes are compared with their checksums.
    #[allow(clippy::needless_pass_by_value)]
    fn read_packed(&self, py: Python<'_>, path: PathBuf, key: &str, check: bool) -> Option<String> {
        py.detach(|| lock(&self.0).read_packed(&path, key, check).err())
    }

    /// Writes what is kept from now on to the file at `path`, which is there; `maps`: and maps it from there.
    #[allow(clippy::needless_pass_by_value)]
    fn write_packed(&self, path: PathBuf, maps: bool) -> std::io::Result<()> {
        lock(&self.0).write_packed(&path, maps)
    }

    /// Ends reading or writing; gives the size of the file that was written, made of what `key` says.
    fn end_packed(&self, py: Python<'_>, key: &str) -> std::io::Result<Option<u64>> {
        py.detach(|| lock(&self.0).end_packed(key))
    }

    /// Bytes written so far.
    #[getter]
    fn packed_bytes(&self) -> u64 {
        lock(&self.0).packed_bytes()
    }

    /// The number of a linear layer that the file has under this label; None: it must be packed.
    fn map_linear(&self, py: Python<'_>, label: &str) -> Option<usize> {
        py.detach(|| lock(&self.0).map_linear(label))
    }

    /// The same for the matrices of heads.
    fn map_heads(&self, py: Python<'_>, label: &str) -> Option<usize> {
        py.detach(|| lock(&self.0).map_heads(label))
    }

    /// Whether the file has the experts of a layer under this label, which are taken then. `gated`: each has a gate.
    fn map_experts(&self, number: usize, label: &str, gated: bool) -> Result<bool> {
        lock(&self.0).map_experts(number, label, gated)
    }

    /// Writes a packed weight to the file under a label, if one is written.
    fn keep(&self, py: Python<'_>, number: usize, label: &str) -> Result<()> {
        py.detach(|| lock(&self.0).keep(number, label))
    }

    /// Takes the weights [channels, kernel] of a causal convolution; gives their number.
    #[pyo3(signature = (weight, kernel, bias=None))]
    fn add_conv(
        &self,
        weight: &Bound<'_, PyAny>,
        kernel: usize,
        bias: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let (weight, bias) = (values::<f32>(weight)?, bias.map(values).transpose()?);
        Ok(lock(&self.0).add_conv(&weight, bias, kernel)?)
    }

    /// Takes the numbers of each head of a recurrence, and the limits of its time step; gives their number.
    fn add_scan(
        &self,
        decay: &Bound<'_, PyAny>,
        bias: &Bound<'_, PyAny>,
        skip: Option<&Bound<'_, PyAny>>,
        limits: (f32, f32),
    ) -> PyResult<usize> {
        let (decay, bias) = (values(decay)?, values(bias)?);
        let skip = skip.map(values).transpose()?;
        Ok(lock(&self.0).add_scan(decay, bias, skip, limits)?)
    }

    fn embed(&self, program: &CpuProgram, weight: usize, scale: f32) -> Result<usize> {
        lock(&self.0).record_embed(&mut lock(&program.0), weight, scale)
    }

    fn embed_places(&self, program: &CpuProgram, weight: usize) -> Result<usize> {
        lock(&self.0).record_embed_places(&mut lock(&program.0), weight)
    }

    /// Begins what is computed after the rows of x were sampled from.
    fn begin_draft(&self, program: &CpuProgram, x: usize) -> Result<()> {
        lock(&self.0).record_begin_draft(&mut lock(&program.0), x)
    }

    fn embed_next(&self, program: &CpuProgram, weight: usize, scale: f32) -> Result<usize> {
        lock(&self.0).record_embed_next(&mut lock(&program.0), weight, scale)
    }

    fn join(&self, program: &CpuProgram, first: usize, second: usize) -> Result<usize> {
        lock(&self.0).record_join(&mut lock(&program.0), first, second)
    }

    /// Ends the recording of a program that guesses, for each row of x the largest of the logits that `head` gives.
    fn draft(&self, program: &CpuProgram, x: usize, head: usize) -> Result<()> {
        lock(&self.0).record_draft(&mut lock(&program.0), x, head)
    }

    fn norm(&self, program: &CpuProgram, x: usize, weight: usize) -> Result<usize> {
        lock(&self.0).record_norm(&mut lock(&program.0), x, weight)
    }

    fn add_and_norm(
        &self,
        program: &CpuProgram,
        x: usize,
        residual: usize,
        weight: usize,
        scale: f32,
    ) -> Result<(usize, usize)> {
        lock(&self.0).record_add_norm(&mut lock(&program.0), (x, residual), scale, weight)
    }

    fn add(&self, program: &CpuProgram, x: usize, residual: usize, scale: f32) -> Result<usize> {
        lock(&self.0).record_add(&mut lock(&program.0), (x, residual), scale)
    }

    fn scale(&self, program: &CpuProgram, x: usize, factor: f32) -> Result<usize> {
        lock(&self.0).record_scale(&mut lock(&program.0), x, factor)
    }

    fn linear(&self, program: &CpuProgram, x: usize, weight: usize) -> Result<usize> {
        lock(&self.0).record_linear(&mut lock(&program.0), x, weight)
    }

    fn rope_and_cache(
        &self,
        program: &CpuProgram,
        qkv: usize,
        layer: usize,
        norms: (Option<usize>, Option<usize>, Option<usize>),
    ) -> Result<usize> {
        let norms = [norms.0, norms.1, norms.2];
        lock(&self.0).record_rope_and_cache(&mut lock(&program.0), qkv, layer, norms)
    }

    #[pyo3(signature = (program, queries, layer, sinks=None, distances=None))]
    fn attention(
        &self,
        program: &CpuProgram,
        queries: usize,
        layer: usize,
        sinks: Option<usize>,
        distances: Option<usize>,
    ) -> Result<usize> {
        let given = (sinks, distances);
        lock(&self.0).record_attention(&mut lock(&program.0), queries, layer, given)
    }

    /// An activation: `gated`, of x's first half times the second; or of x, times columns of `factor` from `start` on.
    #[pyo3(signature = (program, x, name, parameters, *, gated=false, factor=None, start=0))]
    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
    fn activate(
        &self,
        program: &CpuProgram,
        x: usize,
        name: &str,
        parameters: Vec<f32>,
        gated: bool,
        factor: Option<usize>,
        start: usize,
    ) -> Result<usize> {
        let activation = activation(name, &parameters)?;
        let factor = factor.map(|factor| (factor, start));
        lock(&self.0).record_activate(&mut lock(&program.0), x, activation, gated, factor)
    }

    fn heads(&self, program: &CpuProgram, x: usize, weight: usize, passed: usize) -> Result<usize> {
        lock(&self.0).record_heads(&mut lock(&program.0), x, weight, passed)
    }

    fn latent_cache(
        &self,
        program: &CpuProgram,
        q: usize,
        kv: usize,
        layer: usize,
        norm: usize,
    ) -> Result<usize> {
        lock(&self.0).record_latent_cache(&mut lock(&program.0), (q, kv), layer, norm)
    }

    fn route(&self, program: &CpuProgram, x: usize, weight: usize) -> Result<usize> {
        lock(&self.0).record_route(&mut lock(&program.0), x, weight)
    }

    fn experts(
        &self,
        program: &CpuProgram,
        x: usize,
        routing: usize,
        weight: usize,
    ) -> Result<usize> {
        lock(&self.0).record_experts(&mut lock(&program.0), (x, routing), weight)
    }

    /// A causal convolution; `gate` is "none", "silu" or "inputs".
    fn conv(
        &self,
        program: &CpuProgram,
        x: usize,
        layer: usize,
        weight: usize,
        gate: &str,
    ) -> Result<usize> {
        let gate = match gate {
            "none" => ConvGate::None,
            "silu" => ConvGate::Silu,
            "inputs" => ConvGate::Inputs,
            _ => {
                let message = format!("must be none, silu or inputs, but {gate} was given");
                return Err(Error::invalid("gate", message));
            }
        };
        lock(&self.0).record_conv(&mut lock(&program.0), x, layer, weight, gate)
    }

    /// A recurrence; `rule` is "delta", `delta_tiled` or "mamba".
    fn scan(
        &self,
        program: &CpuProgram,
        x: usize,
        gates: usize,
        layer: usize,
        weight: usize,
        rule: &str,
    ) -> Result<usize> {
        let rule = match rule {
            "delta" => ScanRule::Delta { tiled: false },
            "delta_tiled" => ScanRule::Delta { tiled: true },
            "mamba" => ScanRule::Mamba,
            _ => {
                let message = format!("must be delta, delta_tiled or mamba, but {rule} was given");
                return Err(Error::invalid("rule", message));
            }
        };
        lock(&self.0).record_scan(&mut lock(&program.0), (x, gates), layer, weight, rule)
    }

    /// Each row times the sigmoid of its gate, in place.
    fn gate_rows(&self, program: &CpuProgram, x: usize, gates: usize) -> Result<usize> {
        lock(&self.0).record_gate_rows(&mut lock(&program.0), x, gates)
    }

    fn rows(&self, program: &CpuProgram, x: usize) -> Result<usize> {
        lock(&self.0).record_rows(&mut lock(&program.0), x)
    }

    fn finish(&self, program: &CpuProgram, x: usize) -> Result<()> {
        lock(&self.0).record_result(&mut lock(&program.0), x)
    }

    /// Runs a step over the arrays, without the GIL, and samples its rows from the logits that `head` gives.
    #[pyo3(signature = (program, head, arrays, n_tokens, n_seqs, n_rows, edits=None))]
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
        edits: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let masks = edits.map(token_masks).transpose()?.flatten();
        let edits = edits.map(logit_edits).transpose()?;
        let sizes = (n_tokens, n_seqs, n_rows);
        let outcome =
            py.detach(|| self.step(program, head, arrays, sizes, edits.as_ref(), masks.as_ref()));
        Ok(outcome?)
    }

    /// The logits of the last step's rows, float32 row after row; changed where a row had a temperature or edits.
    fn logits<'py>(&self, py: Python<'py>, n_rows: usize) -> PyResult<Bound<'py, PyBytes>> {
        self.rows_of(py, n_rows, Model::logits)
    }

    /// The logits that the guesses of the last step were made from, as `logits`.
    fn draft_logits<'py>(&self, py: Python<'py>, n_rows: usize) -> PyResult<Bound<'py, PyBytes>> {
        self.rows_of(py, n_rows, Model::draft_logits)
    }

    /// Computes one pass of some texts, without the GIL: their pooled states, float32 row after row, once it was the last.
    fn embed_pass<'py>(
        &self,
        py: Python<'py>,
        program: &CpuProgram,
        texts: &CpuTexts,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let bytes = py.detach(|| {
            let mut passes = lock(&texts.0);
            let Some(running) = passes.as_mut() else {
                return Err(Error::internal("these texts are embedded already"));
            };
            let last = contained(|| running.run(&mut lock(&self.0), &lock(&program.0)))?;
            let embeddings = if last { passes.take() } else { None };
            let bytes = |vector: EmbedPasses| -> Vec<u8> {
                let values = vector.into_embeddings();
                values.iter().flat_map(|x| x.to_ne_bytes()).collect()
            };
            Ok(embeddings.map(bytes))
        })?;
        Ok(bytes.map(|bytes| PyBytes::new(py, &bytes)))
    }
}

impl CpuModel {
    fn rows_of<'py>(
        &self,
        py: Python<'py>,
        n_rows: usize,
        logits: fn(&Model) -> &[f32],
    ) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = py.detach(|| {
            let model = lock(&self.0);
            let values = logits(&model).get(..n_rows * model.vocab_size());
            values.map(|values| -> Vec<u8> {
                let bytes = values.iter().flat_map(|value| value.to_ne_bytes());
                bytes.collect()
            })
        });
        let bytes = bytes
            .ok_or_else(|| Error::internal(format!("the last step had less than {n_rows} rows")))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// What `add` makes of these parts; gives its number. Packed without the GIL.
    fn pack(
        &self,
        py: Python<'_>,
        parts: Vec<GivenPart<'_>>,
        quantize: Option<&str>,
        add: fn(&mut Model, &[Matrix<'_>]) -> Result<usize>,
    ) -> PyResult<usize> {
        let parts: Vec<_> = parts
            .into_iter()
            .map(|part| StoredPart::new(part, quantize))
            .collect::<PyResult<_>>()?;
        let matrices: Vec<_> = parts
            .iter()
            .map(StoredPart::matrix)
            .collect::<Result<_>>()?;
        Ok(py.detach(|| add(&mut lock(&self.0), &matrices))?)
    }

    /// Runs a step of so many tokens, sequences and sampled rows over the arrays, which nobody else may touch meanwhile.
    pub(super) fn step(
        &self,
        program: &CpuProgram,
        head: usize,
        arrays: &CpuArrays,
        (n_tokens, n_seqs, n_rows): (usize, usize, usize),
        edits: Option<&LogitEdits>,
        masks: Option<&MaskWords>,
    ) -> Result<()> {
        contained(|| {
            let (mut model, program) = (lock(&self.0), lock(&program.0));
            // SAFETY: the engine fills the arrays before this call, and touches them again after it; other calls wait for the
            // model.
            let (step, rows, out, drafts) = unsafe { arrays.step(n_tokens, n_seqs, n_rows)? };
            let sampling = StepSampling {
                rows,
                edits,
                masks: masks.map(|masks| masks as &dyn TokenMasks),
                out,
                drafts,
            };
            model.run(&program, head, &step, &sampling)
        })
    }
}

impl CpuModel {
    /// See [`Model::save`].
    pub(super) fn save(&self, slot: Option<u32>, block: Option<u32>) -> Result<Vec<u8>> {
        contained(|| lock(&self.0).save(slot, block))
    }

    /// See [`Model::load`].
    pub(super) fn load(&self, slot: Option<u32>, block: Option<u32>, bytes: &[u8]) -> Result<()> {
        contained(|| lock(&self.0).load(slot, block, bytes))
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
