//! A decoder on the CPU: its weights and KV cache, and the recording of what a step does with them.

use super::activation::Activation;
use super::attention::{Attention, AttentionShape, Distances, KvCache, KvShape, PAGE};
use super::elementwise::Norm;
use super::experts::{ExpertMatrices, ExpertNumbers, ExpertsWeight, Router, RouterWeight};
use super::heads::HeadsWeight;
use super::isa::Isa;
use super::linear::{Linear, Matrix};
use super::packed::Packed;
use super::pool::Pool;
use super::program::{LinearShape, Program, QkvShape};
use super::recurrent::{ConvWeight, RecurrentShape, ScanWeight, StateCache};
use super::scratch::Scratch;
use crate::error::{Error, Result};

/// The attention of one layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerShape {
    /// How its work is cut, and what it sees.
    pub attention: AttentionShape,
    /// Of the product of a query and a key.
    pub scale: f32,
    /// See [`super::attention::LayerAttention`].
    pub softcap: Option<f32>,
    /// Which of the model's rotations its queries and keys pass; `None`: none.
    pub rope: Option<usize>,
    /// Which of the model's scales its queries are multiplied by.
    pub query_scales: Option<usize>,
    /// The layer whose keys and values it reads, if it has none of its own.
    pub shares: Option<usize>,
    /// Of latent attention: how wide the latent is. What follows it in each head is rotated.
    pub rank: Option<usize>,
}

/// Sizes of a decoder. Lengths in tokens.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct ModelShape {
    pub vocab_size: usize,
    /// Of those with attention.
    pub layers: Vec<LayerShape>,
    /// Of those with a recurrent state.
    pub recurrent: Vec<RecurrentShape>,
    /// States that there is room for.
    pub state_slots: usize,
    pub block_size: usize,
    pub num_blocks: usize,
    /// Blocks of layers with a window; 0: they have those of the others.
    pub num_window_blocks: usize,
    /// Positions that sequences may have, for which the tables are.
    pub positions: usize,
    /// Of the logits; the cap comes after the scale.
    pub logits_scale: Option<f32>,
    pub logits_softcap: Option<f32>,
}

/// What depends on a token's position.
#[derive(Debug, Clone, Default)]
pub struct PositionTables {
    /// Cos and sin, `[positions, head_dim / 2]` each.
    pub ropes: Vec<(Vec<f32>, Vec<f32>)>,
    /// `[positions]`.
    pub query_scales: Vec<Vec<f32>>,
}

/// A norm's weights, loaded.
pub(super) struct NormWeight {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    eps: f32,
    centered: bool,
    /// Parts of a row that are normed by themselves and have weights of their own.
    pub(super) parts: usize,
}

impl NormWeight {
    fn width(&self) -> usize {
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
    /// Layers whose outputs lie side by side: one, unless the parts' formats differ.
    Linear(Vec<Linear>),
    Norm(NormWeight),
    /// Of attention, one for each query head.
    Sinks(Vec<f32>),
    Distances(Distances),
    Heads(HeadsWeight),
    Router(Box<RouterWeight>),
    Experts(ExpertsWeight),
    Conv(ConvWeight),
    Scan(ScanWeight),
}

/// What of a model a step reads, and what follows from its shape.
pub(super) struct Architecture {
    pub(super) shape: ModelShape,
    pub(super) tables: PositionTables,
    /// For each layer, the layer of the cache it reads, and which of the shapes of attention it has.
    pub(super) places: Vec<(usize, usize)>,
    /// Of each layer of the cache.
    pub(super) cached: Vec<KvShape>,
    /// Which of them have the blocks of layers with a window.
    pub(super) windowed: Vec<bool>,
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
}

fn check(holds: bool, field: &str, what: impl FnOnce() -> String) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::invalid(field, what()))
    }
}

fn no_experts(weight: usize) -> Error {
    Error::invalid(
        "program",
        format!("weight {weight} is not the experts of a layer"),
    )
}

/// That tables and shared layers fit.
fn check_layer(shape: &ModelShape, tables: &PositionTables, index: usize) -> Result<()> {
    let layer = &shape.layers[index];
    let kv = layer.attention.kv;
    check(
        kv.kv_heads > 0
            && layer.attention.parts > 0
            && layer
                .attention
                .heads
                .is_multiple_of(kv.kv_heads * layer.attention.parts),
        "layers",
        || format!("the query heads of layer {index} are not a multiple of its key-value heads"),
    )?;
    check(layer.attention.window != Some(0), "layers", || {
        format!("the window of layer {index} must be at least 1")
    })?;
    let rank = layer.rank.unwrap_or(0);
    check(
        layer.rank.is_none() || (kv.kv_heads == 1 && rank < kv.head_dim && layer.shares.is_none()),
        "layers",
        || format!("layer {index} must have one latent, less wide than its heads"),
    )?;
    let angles = shape.positions * (kv.head_dim.saturating_sub(rank) / 2);
    let table = layer.rope.map(|rope| tables.ropes.get(rope));
    check(
        table.is_none_or(|table| {
            table.is_some_and(|(cos, sin)| cos.len() == angles && sin.len() == angles)
        }),
        "rope",
        || format!("the tables of cos and sin do not fit layer {index}"),
    )?;
    let scales = layer.query_scales.map(|at| tables.query_scales.get(at));
    check(
        scales.is_none_or(|scales| scales.is_some_and(|scales| scales.len() == shape.positions)),
        "query_scales",
        || format!("the scales of queries do not fit layer {index}"),
    )?;
    let shared = layer.shares.map(|other| (other, shape.layers.get(other)));
    check(
        shared.is_none_or(|(other, shared)| {
            other < index
                && shared.is_some_and(|shared| shared.shares.is_none() && shared.attention.kv == kv)
        }),
        "shares",
        || format!("layer {index} must share what a layer of the same shape before it has"),
    )
}

impl Architecture {
    fn new(shape: ModelShape, tables: PositionTables) -> Result<(Self, Vec<AttentionShape>)> {
        let (mut cached, mut windowed, mut attention) = (Vec::new(), Vec::new(), Vec::new());
        let mut places: Vec<(usize, usize)> = Vec::new();
        for (index, layer) in shape.layers.iter().enumerate() {
            check_layer(&shape, &tables, index)?;
            let cache = layer.shares.map_or(cached.len(), |other| places[other].0);
            let window = shape.num_window_blocks > 0 && layer.attention.window.is_some();
            if layer.shares.is_none() {
                cached.push(layer.attention.kv);
                windowed.push(window);
            }
            windowed[cache] &= window;
            let known = attention.iter().position(|known| *known == layer.attention);
            places.push((cache, known.unwrap_or(attention.len())));
            if known.is_none() {
                attention.push(layer.attention);
            }
        }
        let architecture = Self {
            shape,
            tables,
            places,
            cached,
            windowed,
        };
        Ok((architecture, attention))
    }
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

    /// Packs the matrices of a linear layer, whose outputs lie side by side; gives its number.
    ///
    /// # Errors
    /// Those of [`Linear::pack`].
    pub fn add_linear(&mut self, parts: &[Matrix]) -> Result<usize> {
        let parts = Linear::pack(self.isa, &self.pool, parts)?;
        self.weights.push(Weight::Linear(parts));
        Ok(self.weights.len() - 1)
    }

    /// Takes the weights of a norm in, which is an RMS norm unless it is `centered`; gives its number.
    ///
    /// # Errors
    /// `invalid_value` for no weight, or a bias of another width.
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

    /// Takes a layer's attention sinks in; gives their number.
    pub fn add_sinks(&mut self, sinks: Vec<f32>) -> usize {
        self.weights.push(Weight::Sinks(sinks));
        self.weights.len() - 1
    }

    /// Takes in what attention adds to scores by distance, an odd number of values for each head; gives its number.
    ///
    /// # Errors
    /// Those of [`Distances::new`].
    pub fn add_distances(&mut self, values: &[f32], heads: usize) -> Result<usize> {
        let distances = Distances::new(values, heads)?;
        self.weights.push(Weight::Distances(distances));
        Ok(self.weights.len() - 1)
    }

    /// Takes a layer's router in, of one matrix `[experts, hidden]`, which is kept as floats; gives its number.
    ///
    /// # Errors
    /// Those of [`Linear::pack`]; `invalid_value` for a choice that so many experts do not leave.
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

    /// Makes room for the experts of a layer; gives their number. `scaled_inputs`: what their router gives is multiplied with their
    /// inputs, and not with their outputs.
    pub fn add_experts(&mut self, activation: Activation, scaled_inputs: bool) -> usize {
        let weight = ExpertsWeight::new(activation, scaled_inputs);
        self.weights.push(Weight::Experts(weight));
        self.weights.len() - 1
    }

    /// Packs further experts of a layer.
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

    /// Packs matrices of one shape, one for each head; gives their number.
    ///
    /// # Errors
    /// `invalid_value` for matrices that do not fit each other or their bytes.
    pub fn add_heads(&mut self, matrices: &[Matrix]) -> Result<usize> {
        let weight = HeadsWeight::pack(self.isa, &self.pool, matrices)?;
        self.weights.push(Weight::Heads(weight));
        Ok(self.weights.len() - 1)
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

    /// How wide a norm is that is not of parts of a row.
    fn norm_width(&self, weight: usize) -> Result<usize> {
        let norm = self.norm_weight(weight)?;
        check(norm.parts == 1, "program", || {
            format!("norm {weight} is one of parts of a row")
        })?;
        Ok(norm.width())
    }

    fn norm_weight(&self, weight: usize) -> Result<&NormWeight> {
        match self.weights.get(weight) {
            Some(Weight::Norm(norm)) => Ok(norm),
            _ => Err(Error::invalid(
                "program",
                format!("weight {weight} is not a norm"),
            )),
        }
    }

    fn layer(&self, layer: usize) -> Result<&LayerShape> {
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

    /// Records the look-up of the step's tokens, whose rows are multiplied by `scale`.
    ///
    /// # Errors
    /// `invalid_value`, here and in the other recording methods, for weights, values or widths that do not fit.
    pub fn record_embed(&self, program: &mut Program, weight: usize, scale: f32) -> Result<usize> {
        let shape = self.linear_shape(weight)?;
        Ok(program.embed(weight, shape.cols, scale))
    }

    /// Records the look-up of rows of a table by [`StepInput::places`](super::StepInput).
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_embed_places(&self, program: &mut Program, weight: usize) -> Result<usize> {
        let shape = self.linear_shape(weight)?;
        Ok(program.embed_places(weight, shape.cols))
    }

    /// Records a norm.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_norm(&self, program: &mut Program, x: usize, weight: usize) -> Result<usize> {
        let norm = self.norm_weight(weight)?;
        if norm.parts > 1 {
            program.expect(x, "norm", norm.weight.len())?;
        }
        program.norm(x, weight, norm.width())
    }

    /// Records the norm of `residual + x * scale`, and gives it and the sum, which takes the place of `residual`.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_add_norm(
        &self,
        program: &mut Program,
        values: (usize, usize),
        scale: f32,
        weight: usize,
    ) -> Result<(usize, usize)> {
        program.add_norm(values, scale, weight, self.norm_width(weight)?)
    }

    /// Records `residual + x * scale`, which takes the place of `residual`.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_add(
        &self,
        program: &mut Program,
        (x, residual): (usize, usize),
        scale: f32,
    ) -> Result<usize> {
        program.add(x, residual, scale)
    }

    /// Records `x * factor`, which takes the place of `x`.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_scale(&self, program: &mut Program, x: usize, factor: f32) -> Result<usize> {
        program.scale(x, factor)
    }

    /// Records each row of `x` times the sigmoid of its gate, which takes the place of `x`.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_gate_rows(&self, program: &mut Program, x: usize, gates: usize) -> Result<usize> {
        program.gate_rows(x, gates)
    }

    /// Records a linear layer.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_linear(&self, program: &mut Program, x: usize, weight: usize) -> Result<usize> {
        program.linear(x, weight, self.linear_shape(weight)?)
    }

    /// Records norms, rotation and KV write; the norms are those of q, k and v, a head wide or as wide as all heads.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_rope_and_cache(
        &self,
        program: &mut Program,
        qkv: usize,
        layer: usize,
        norms: [Option<usize>; 3],
    ) -> Result<usize> {
        let shape = self.layer(layer)?;
        let kv = shape.attention.kv;
        let (q_size, kv_size) = (
            shape.attention.heads * kv.head_dim,
            kv.kv_heads * kv.head_dim,
        );
        for (norm, all) in norms.into_iter().zip([q_size, kv_size, kv_size]) {
            let Some(norm) = norm else { continue };
            let width = self.norm_width(norm)?;
            if width != kv.head_dim && width != all {
                let given = format!("the norms of q, k and v must be {} wide", kv.head_dim);
                return Err(Error::invalid(
                    "program",
                    format!("{given} or as wide as all heads, {all}, but {width} was given"),
                ));
            }
        }
        let sizes = QkvShape {
            q_size,
            kv_size: if shape.shares.is_some() { 0 } else { kv_size },
        };
        program.rope_and_cache(qkv, layer, norms, sizes)
    }

    /// Records attention, with sinks and addends for distances where there are any.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_attention(
        &self,
        program: &mut Program,
        queries: usize,
        layer: usize,
        (sinks, distances): (Option<usize>, Option<usize>),
    ) -> Result<usize> {
        let shape = self.layer(layer)?.attention;
        let known = |weight: usize| match self.weights.get(weight) {
            Some(Weight::Sinks(sinks)) => sinks.len() == shape.heads,
            _ => false,
        };
        check(sinks.is_none_or(known), "program", || {
            format!(
                "layer {layer} needs a sink for each of its {} heads",
                shape.heads
            )
        })?;
        let positions = self.architecture.shape.positions;
        let fits = |weight: usize| match self.weights.get(weight) {
            Some(Weight::Distances(distances)) => {
                distances.heads() == shape.heads && distances.most() >= positions
            }
            _ => false,
        };
        check(distances.is_none_or(fits), "program", || {
            format!(
                "layer {layer} needs distances up to {positions} for each of its {} heads",
                shape.heads
            )
        })?;
        let given = (sinks, distances);
        program.attention(queries, layer, given, shape.heads * shape.kv.head_dim)
    }

    /// Records an activation: of a value's first half, times the second (`gated`); or of all of it, times the columns from
    /// `factor.1` on of another value, if there is one.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_activate(
        &self,
        program: &mut Program,
        x: usize,
        activation: Activation,
        gated: bool,
        factor: Option<(usize, usize)>,
    ) -> Result<usize> {
        program.activate(x, activation, gated, factor)
    }

    /// Records a linear layer for each head: of a head's columns the first, then the `passed` ones after them as they are.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_heads(
        &self,
        program: &mut Program,
        x: usize,
        weight: usize,
        passed: usize,
    ) -> Result<usize> {
        let Some(Weight::Heads(heads)) = self.weights.get(weight) else {
            return Err(Error::invalid(
                "program",
                format!("weight {weight} is not one for each head"),
            ));
        };
        let shape = (heads.count(), heads.inputs, heads.outputs);
        program.heads(x, weight, shape, passed)
    }

    /// Records the norm of latents, the rotation of what follows them and of the queries' ends, and the write of both as keys and
    /// values; gives the queries.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_latent_cache(
        &self,
        program: &mut Program,
        values: (usize, usize),
        layer: usize,
        norm: usize,
    ) -> Result<usize> {
        let shape = self.layer(layer)?;
        let width = self.norm_width(norm)?;
        let (heads, head_dim) = (shape.attention.heads, shape.attention.kv.head_dim);
        check(shape.rank == Some(width), "program", || {
            format!("layer {layer} needs latents as wide as their norm, {width}")
        })?;
        program.latent_cache(values, layer, norm, (heads * head_dim, head_dim))
    }

    /// Records the choice of experts for each row.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_route(&self, program: &mut Program, x: usize, weight: usize) -> Result<usize> {
        let Some(Weight::Router(router)) = self.weights.get(weight) else {
            return Err(Error::invalid(
                "program",
                format!("weight {weight} is not a router"),
            ));
        };
        let (experts, columns) = (router.linear.out_features(), router.linear.in_features());
        program.route(x, weight, (experts, columns, router.top_k))
    }

    /// Records what the experts that `values.1` chooses make of the rows of `values.0`.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_experts(
        &self,
        program: &mut Program,
        values: (usize, usize),
        weight: usize,
    ) -> Result<usize> {
        let Some(Weight::Experts(experts)) = self.weights.get(weight) else {
            return Err(no_experts(weight));
        };
        program.experts(values, weight, (experts.count(), experts.hidden))
    }

    /// Records the choice of the sampled rows.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_rows(&self, program: &mut Program, x: usize) -> Result<usize> {
        program.gather_rows(x)
    }

    /// Ends the recording: `x` is what the program leaves.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_result(&self, program: &mut Program, x: usize) -> Result<()> {
        program.finish(x)
    }
}
