//! How Python describes a model to the kernels: its layers, and the names of its types and activations.

use pyo3::prelude::*;

use crate::cpu::attention::{AttentionShape, KvShape, KvType, PAGE};
use crate::cpu::{Activation, LayerShape, RecurrentShape};
use crate::error::{Error, Result};

pub(super) fn kv_type(name: &str) -> Result<KvType> {
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
pub(super) struct GivenLayer {
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
    pub(super) fn shape(
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
pub(super) struct GivenState {
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
