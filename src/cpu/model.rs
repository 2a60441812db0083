//! A decoder on the CPU: its weights, its KV cache and its states.

use super::activation::Activation;
use super::architecture::{Architecture, LayerShape, ModelShape, PositionTables, check};
use super::attention::{Attention, Distances, KvCache, PAGE};
use super::elementwise::Norm;
use super::experts::{ExpertMatrices, ExpertNumbers, ExpertsWeight, Router, RouterWeight};
use super::heads::HeadsWeight;
use super::isa::Isa;
use super::linear::{Linear, Matrix};
use super::low_rank::{Adapters, LowRank};
use super::packed::Packed;
use super::pool::Pool;
use super::program::LinearShape;
use super::recurrent::{ConvWeight, ScanWeight, StateCache};
use super::scratch::Scratch;
use crate::error::{Error, Result};

/// A norm's weights, loaded.
pub(super) struct NormWeight {
    pub(super) weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    eps: f32,
    centered: bool,
    /// Number of parts of a row that are normed separately, each with weights of its own.
    pub(super) parts: usize,
}

impl NormWeight {
    pub(super) fn width(&self) -> usize {
        self.weight.len() / self.parts
    }

    pub(super) fn view(&self) -> Norm<'_> {
        Norm {
            weight: &self.weight,
            bias: self.bias.as_deref(),
            eps: self.eps,
            centered: self.centered,
        }
    }
}

/// A loaded weight.
pub(super) enum Weight {
    /// Matrices whose outputs are side by side: one, or several if the formats of its parts differ.
    Linear(Vec<Linear>),
    Norm(NormWeight),
    /// The sinks of attention, one for each query head.
    Sinks(Vec<f32>),
    Distances(Distances),
    Heads(HeadsWeight),
    Router(Box<RouterWeight>),
    Experts(ExpertsWeight),
    Conv(ConvWeight),
    Scan(ScanWeight),
}

/// A decoder's weights, cache and buffers.
pub struct Model {
    pub(super) isa: Isa,
    pub(super) pool: Pool,
    pub(super) architecture: Architecture,
    pub(super) weights: Vec<Weight>,
    pub(super) cache: KvCache,
    pub(super) states: StateCache,
    pub(super) attention: Attention,
    pub(super) scratch: Scratch,
    pub(super) packed: Packed,
    pub(super) adapters: Adapters,
}

pub(super) fn no_experts(weight: usize) -> Error {
    Error::invalid(
        "program",
        format!("weight {weight} is not the experts of a layer"),
    )
}

impl Model {
    /// A model without weights, with an empty cache.
    ///
    /// # Errors
    /// `invalid_value` for a block size that is no multiple of a page, or layers or tables that do not fit.
    pub fn new(
        isa: Isa,
        threads: usize,
        shape: ModelShape,
        tables: PositionTables,
    ) -> Result<Self> {
        check(
            shape.block_size > 0 && shape.block_size.is_multiple_of(PAGE),
            "block_size",
            || {
                let given = shape.block_size;
                format!("must be a multiple of {PAGE} tokens, but {given} was given")
            },
        )?;
        check(
            shape.num_window_blocks == 0 || shape.recurrent.is_empty(),
            "num_window_blocks",
            || "a model with recurrent layers has the same blocks in all layers".to_owned(),
        )?;
        let of_block = shape.block_size / PAGE;
        let pages = (
            shape.num_blocks * of_block,
            shape.num_window_blocks * of_block,
        );
        let (architecture, attention) = Architecture::new(shape, tables)?;
        let pool = Pool::new(threads);
        Ok(Self {
            isa,
            weights: Vec::new(),
            cache: KvCache::with_windows(&architecture.cached, &architecture.windowed, pages),
            states: StateCache::new(
                &architecture.shape.recurrent,
                architecture.shape.state_slots,
            ),
            attention: Attention::new(isa, &attention, pool.size()),
            scratch: Scratch::default(),
            packed: Packed::default(),
            adapters: Adapters::default(),
            architecture,
            pool,
        })
    }

    /// The instructions it computes with.
    pub const fn isa(&self) -> Isa {
        self.isa
    }

    /// Columns of the logits.
    pub const fn vocab_size(&self) -> usize {
        self.architecture.shape.vocab_size
    }

    /// Packs the matrices of a linear layer, whose outputs are side by side. Returns its number.
    ///
    /// # Errors
    /// Those of [`Linear::pack`].
    pub fn add_linear(&mut self, parts: &[Matrix]) -> Result<usize> {
        let parts = Linear::pack(self.isa, &self.pool, parts)?;
        self.weights.push(Weight::Linear(parts));
        Ok(self.weights.len() - 1)
    }

    /// Adds the weights of a norm: a layer norm if `centered`, otherwise an RMS norm. Returns its number.
    ///
    /// # Errors
    /// `invalid_value` for an empty weight, or a bias of another width.
    pub fn add_norm(
        &mut self,
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        eps: f32,
        centered: bool,
        parts: usize,
    ) -> Result<usize> {
        let fits = |bias: &Vec<f32>| bias.len() == weight.len();
        check(
            !weight.is_empty() && bias.as_ref().is_none_or(fits),
            "norm",
            || "a norm's weight and bias must be of one width".to_owned(),
        )?;
        let divided = parts > 0 && weight.len().is_multiple_of(parts);
        check(divided && (parts == 1 || bias.is_none()), "norm", || {
            format!("{parts} parts must share a norm's weights, and have no bias")
        })?;
        self.weights.push(Weight::Norm(NormWeight {
            weight,
            bias,
            eps,
            centered,
            parts,
        }));
        Ok(self.weights.len() - 1)
    }

    /// Adds a layer's attention sinks. Returns their number.
    pub fn add_sinks(&mut self, sinks: Vec<f32>) -> usize {
        self.weights.push(Weight::Sinks(sinks));
        self.weights.len() - 1
    }

    /// Adds what attention adds to scores by distance: an odd number of values for each head. Returns their number.
    ///
    /// # Errors
    /// Those of [`Distances::new`].
    pub fn add_distances(&mut self, values: &[f32], heads: usize) -> Result<usize> {
        let distances = Distances::new(values, heads)?;
        self.weights.push(Weight::Distances(distances));
        Ok(self.weights.len() - 1)
    }

    /// Adds a layer's router with its matrix `[experts, hidden]`, which is kept as floats. Returns its number.
    ///
    /// # Errors
    /// Those of [`Linear::pack`]; `invalid_value` for a choice of more experts than there are.
    pub fn add_router(
        &mut self,
        matrix: Matrix,
        router: Router,
        numbers: ExpertNumbers,
        factor: f32,
        top_k: usize,
    ) -> Result<usize> {
        let linear = Linear::pack(self.isa, &self.pool, &[matrix])?.remove(0);
        let weight = RouterWeight::new(linear, router, numbers, factor, top_k)?;
        self.weights.push(Weight::Router(Box::new(weight)));
        Ok(self.weights.len() - 1)
    }

    /// Adds the experts of a layer, which are loaded later. Returns their number. `scaled_inputs`: the router's weights multiply
    /// the experts' inputs, not their outputs.
    pub fn add_experts(&mut self, activation: Activation, scaled_inputs: bool) -> usize {
        let weight = ExpertsWeight::new(activation, scaled_inputs);
        self.weights.push(Weight::Experts(weight));
        self.weights.len() - 1
    }

    /// Packs more experts of a layer.
    ///
    /// # Errors
    /// `invalid_value` for matrices that do not fit each other or their bytes.
    pub fn extend_experts(&mut self, weight: usize, experts: &[ExpertMatrices]) -> Result<()> {
        match self.weights.get_mut(weight) {
            Some(Weight::Experts(weight)) => weight.extend(self.isa, &self.pool, experts),
            _ => Err(no_experts(weight)),
        }
    }

    pub(super) fn experts_mut(&mut self, weight: usize) -> Result<&mut ExpertsWeight> {
        match self.weights.get_mut(weight) {
            Some(Weight::Experts(weight)) => Ok(weight),
            _ => Err(no_experts(weight)),
        }
    }

    /// Packs matrices of the same shape, one for each head. Returns their number.
    ///
    /// # Errors
    /// `invalid_value` for matrices that do not fit each other or their bytes.
    pub fn add_heads(&mut self, matrices: &[Matrix]) -> Result<usize> {
        let weight = HeadsWeight::pack(self.isa, &self.pool, matrices)?;
        self.weights.push(Weight::Heads(weight));
        Ok(self.weights.len() - 1)
    }

    /// Loads the update of adapter `number` (not 0) for some outputs of a linear layer.
    ///
    /// # Errors
    /// `invalid_value` for a weight that is not a linear layer, or matrices that do not fit it.
    pub fn add_low_rank(&mut self, number: u32, weight: usize, part: LowRank) -> Result<()> {
        let shape = self.linear_shape(weight)?;
        self.adapters.add(number, (weight, shape), part)
    }

    /// Removes an adapter.
    pub fn remove_adapter(&mut self, number: u32) {
        self.adapters.remove(number);
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> usize {
        let bytes = |weight: &Weight| match weight {
            Weight::Linear(parts) => parts.iter().map(Linear::bytes).sum(),
            Weight::Norm(norm) => {
                (norm.weight.len() + norm.bias.as_ref().map_or(0, Vec::len)) * size_of::<f32>()
            }
            Weight::Sinks(sinks) => size_of_val(&**sinks),
            Weight::Distances(distances) => distances.bytes(),
            Weight::Heads(heads) => heads.bytes(),
            Weight::Router(router) => router.bytes(),
            Weight::Experts(experts) => experts.bytes(),
            Weight::Conv(conv) => conv.bytes(),
            Weight::Scan(scan) => scan.bytes(),
        };
        self.weights.iter().map(bytes).sum()
    }

    fn linear(&self, weight: usize) -> Result<&[Linear]> {
        match self.weights.get(weight) {
            Some(Weight::Linear(parts)) => Ok(parts),
            _ => Err(Error::invalid(
                "program",
                format!("weight {weight} is not a linear layer"),
            )),
        }
    }

    /// The width of a norm that is not applied to parts of a row.
    pub(super) fn norm_width(&self, weight: usize) -> Result<usize> {
        let norm = self.norm_weight(weight)?;
        check(norm.parts == 1, "program", || {
            format!("norm {weight} is one of parts of a row")
        })?;
        Ok(norm.width())
    }

    pub(super) fn norm_weight(&self, weight: usize) -> Result<&NormWeight> {
        match self.weights.get(weight) {
            Some(Weight::Norm(norm)) => Ok(norm),
            _ => Err(Error::invalid(
                "program",
                format!("weight {weight} is not a norm"),
            )),
        }
    }

    pub(super) fn layer(&self, layer: usize) -> Result<&LayerShape> {
        let layers = &self.architecture.shape.layers;
        layers.get(layer).ok_or_else(|| {
            let layers = layers.len();
            Error::invalid(
                "program",
                format!("layers lie in [0, {layers}), but {layer} was given"),
            )
        })
    }

    pub(super) fn linear_shape(&self, weight: usize) -> Result<LinearShape> {
        let parts = self.linear(weight)?;
        Ok(LinearShape {
            out: parts.iter().map(Linear::out_features).sum(),
            cols: parts.first().map_or(0, Linear::in_features),
            quantized: parts.iter().any(Linear::is_quantized),
        })
    }
}
