//! A decoder on the CPU: its weights and KV cache, and the recording of what a step does with them.

use super::attention::{Attention, KvCache, KvShape, PAGE};
use super::isa::Isa;
use super::linear::{Linear, Matrix};
use super::pool::Pool;
use super::program::{LinearShape, Program};
use super::run::Memory;
use crate::error::{Error, Result};

/// Sizes of a decoder. Lengths in tokens.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct ModelShape {
    pub vocab_size: usize,
    pub heads: usize,
    pub layers: usize,
    pub rms_norm_eps: f32,
    pub kv: KvShape,
    pub block_size: usize,
    pub num_blocks: usize,
}

/// A loaded weight.
pub(super) enum Weight {
    /// Layers whose outputs lie side by side: one, unless the parts' formats differ.
    Linear(Vec<Linear>),
    /// Of an RMS norm.
    Norm(Vec<f32>),
}

/// A decoder's weights, cache and buffers.
pub struct Model {
    pub(super) isa: Isa,
    pub(super) pool: Pool,
    pub(super) shape: ModelShape,
    pub(super) weights: Vec<Weight>,
    /// Of each position, `[head_dim / 2]`.
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
    pub(super) cache: KvCache,
    pub(super) attention: Attention,
    pub(super) memory: Memory,
}

impl Model {
    /// A model without weights, with an empty cache, for positions below `cos.len() / (head_dim / 2)`.
    ///
    /// # Errors
    /// `invalid_value` for a block size that is no multiple of a page, or tables of different lengths.
    pub fn new(
        isa: Isa,
        threads: usize,
        shape: ModelShape,
        cos: Vec<f32>,
        sin: Vec<f32>,
    ) -> Result<Self> {
        if shape.block_size == 0 || !shape.block_size.is_multiple_of(PAGE) {
            let given = shape.block_size;
            return Err(Error::invalid(
                "block_size",
                format!("must be a multiple of {PAGE} tokens, but {given} was given"),
            ));
        }
        if cos.len() != sin.len() || !cos.len().is_multiple_of(shape.kv.head_dim / 2) {
            return Err(Error::invalid(
                "rope",
                "the tables of cos and sin do not fit",
            ));
        }
        let pages = shape.num_blocks * (shape.block_size / PAGE);
        let pool = Pool::new(threads);
        Ok(Self {
            isa,
            shape,
            weights: Vec::new(),
            cos,
            sin,
            cache: KvCache::new(shape.kv, shape.layers, pages),
            attention: Attention::new(isa, shape.kv, shape.heads, pool.size()),
            memory: Memory::default(),
            pool,
        })
    }

    /// The instructions it computes with.
    pub const fn isa(&self) -> Isa {
        self.isa
    }

    /// Columns of the logits.
    pub const fn vocab_size(&self) -> usize {
        self.shape.vocab_size
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

    /// Takes the weight of an RMS norm in; gives its number.
    pub fn add_norm(&mut self, weight: Vec<f32>) -> usize {
        self.weights.push(Weight::Norm(weight));
        self.weights.len() - 1
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> usize {
        let bytes = |weight: &Weight| match weight {
            Weight::Linear(parts) => parts.iter().map(Linear::bytes).sum(),
            Weight::Norm(weight) => size_of_val(&**weight),
        };
        self.weights.iter().map(bytes).sum()
    }

    fn linear(&self, weight: usize) -> Result<&[Linear]> {
        match self.weights.get(weight) {
            Some(Weight::Linear(parts)) => Ok(parts),
            _ => Err(Error::invalid(
                "program",
                format!("weight {weight} is no linear layer"),
            )),
        }
    }

    fn norm(&self, weight: usize) -> Result<&[f32]> {
        match self.weights.get(weight) {
            Some(Weight::Norm(weight)) => Ok(weight),
            _ => Err(Error::invalid(
                "program",
                format!("weight {weight} is no norm"),
            )),
        }
    }

    pub(super) fn linear_shape(&self, weight: usize) -> Result<LinearShape> {
        let parts = self.linear(weight)?;
        Ok(LinearShape {
            out: parts.iter().map(Linear::out_features).sum(),
            cols: parts.first().map_or(0, Linear::in_features),
            quantized: parts.iter().any(Linear::is_quantized),
        })
    }

    /// Records [`Op::Embed`].
    ///
    /// # Errors
    /// `invalid_value`, here and in the other recording methods, for weights, values or widths that do not fit.
    pub fn record_embed(&self, program: &mut Program, weight: usize) -> Result<usize> {
        let shape = self.linear_shape(weight)?;
        Ok(program.embed(weight, shape.cols))
    }

    /// Records an RMS norm.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_rms_norm(
        &self,
        program: &mut Program,
        x: usize,
        weight: usize,
        eps: f32,
    ) -> Result<usize> {
        program.rms_norm(x, weight, self.norm(weight)?.len(), eps)
    }

    /// Records an RMS norm of a sum, which takes the place of `residual`.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_add_rms_norm(
        &self,
        program: &mut Program,
        (x, residual): (usize, usize),
        weight: usize,
        eps: f32,
    ) -> Result<usize> {
        program.add_rms_norm(x, residual, weight, self.norm(weight)?.len(), eps)
    }

    /// Records a linear layer.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_linear(&self, program: &mut Program, x: usize, weight: usize) -> Result<usize> {
        program.linear(x, weight, self.linear_shape(weight)?)
    }

    /// Records rotation and KV write, with the weights of the norms of q and k where there are any.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_rope_and_cache(
        &self,
        program: &mut Program,
        qkv: usize,
        layer: usize,
        norms: Option<(usize, usize)>,
    ) -> Result<usize> {
        let kv = self.shape.kv;
        if let Some((q, k)) = norms
            && (self.norm(q)?.len(), self.norm(k)?.len()) != (kv.head_dim, kv.head_dim)
        {
            return Err(Error::invalid(
                "program",
                "the norms of q and k must be as wide as a head",
            ));
        }
        let sizes = (self.shape.heads * kv.head_dim, kv.kv_heads * kv.head_dim);
        program.rope_and_cache(qkv, self.layer(layer)?, norms, sizes)
    }

    fn layer(&self, layer: usize) -> Result<usize> {
        if layer < self.shape.layers {
            return Ok(layer);
        }
        let layers = self.shape.layers;
        Err(Error::invalid(
            "program",
            format!("layers lie in [0, {layers}), but {layer} was given"),
        ))
    }

    /// Records causal attention.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_attention(
        &self,
        program: &mut Program,
        queries: usize,
        layer: usize,
    ) -> Result<usize> {
        program.attention(queries, self.layer(layer)?)
    }

    /// Records silu(gate) * up.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_silu_mul(&self, program: &mut Program, x: usize) -> Result<usize> {
        program.silu_mul(x)
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
