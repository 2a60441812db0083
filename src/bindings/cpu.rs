//! The methods of `_core.CpuModel`: loading weights, running steps, and embedding texts.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::cpu_arrays::{CpuArrays, MaskWords, logit_edits, token_masks, values};
use super::cpu_classes::{CpuModel, CpuProgram, lock};
use super::cpu_experts::{GivenExpert, GivenRouter, StoredExpert};
use super::cpu_shape::{GivenLayer, GivenState, activation, kv_type};
use super::cpu_weights::{GivenPart, StoredPart};
use crate::cpu::sample::{LogitEdits, TokenMasks};
use crate::cpu::{
    EmbedPasses, ExpertNumbers, Isa, LowRank, Matrix, Model, ModelShape, Pooling, PositionTables,
    StepSampling, Texts,
};
use crate::error::{Error, Result};

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

/// The instruction set that the kernels use here, such as `avx512`; `isa` asks for one.
#[pyfunction]
#[pyo3(signature = (isa=None))]
pub(super) fn cpu_isa(isa: Option<&str>) -> Result<&'static str> {
    Ok(Isa::choose(isa)?.name())
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
            let last = contained(|| running.run(&mut lock(&self.0), &lock(&program.program)))?;
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
            let (mut model, program) = (lock(&self.0), lock(&program.program));
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
