//! The shape of a model: its layers, their rotations, and the cache's layers and blocks that each of them uses.

use super::attention::{AttentionShape, KvShape};
use super::recurrent::RecurrentShape;
use crate::error::{Error, Result};

/// The attention of one layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerShape {
    /// The sizes of its heads, and what a token sees.
    pub attention: AttentionShape,
    /// The factor of the products of queries and keys.
    pub scale: f32,
    /// See [`super::attention::LayerAttention`].
    pub softcap: Option<f32>,
    /// Index of the rotation of its queries and keys; `None`: they are not rotated.
    pub rope: Option<usize>,
    /// Index of the scales of its queries.
    pub query_scales: Option<usize>,
    /// The layer whose keys and values it uses, if it has none of its own.
    pub shares: Option<usize>,
    /// For latent attention: the width of the latent. The rest of each head is rotated.
    pub rank: Option<usize>,
}

/// The sizes of a decoder.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct ModelShape {
    pub vocab_size: usize,
    /// The layers with attention.
    pub layers: Vec<LayerShape>,
    /// The layers with a recurrent state.
    pub recurrent: Vec<RecurrentShape>,
    /// Number of slots for states.
    pub state_slots: usize,
    pub block_size: usize,
    pub num_blocks: usize,
    /// Number of blocks for layers with a sliding window; 0: they use the same blocks as the others.
    pub num_window_blocks: usize,
    /// Number of positions in the tables: the maximum length of a sequence.
    pub positions: usize,
    /// The factor of the logits. The cap is applied after it.
    pub logits_scale: Option<f32>,
    pub logits_softcap: Option<f32>,
}

/// The tables of everything that depends on a token's position.
#[derive(Debug, Clone, Default)]
pub struct PositionTables {
    /// Tables of cos and sin, `[positions, head_dim / 2]` each.
    pub ropes: Vec<(Vec<f32>, Vec<f32>)>,
    /// Tables of factors of queries, `[positions]`.
    pub query_scales: Vec<Vec<f32>>,
}

/// The parts of a model that a step reads, and what follows from its shape.
pub(super) struct Architecture {
    pub(super) shape: ModelShape,
    pub(super) tables: PositionTables,
    /// For each layer: the layer of the cache that it reads, and the index of its shape of attention.
    pub(super) places: Vec<(usize, usize)>,
    /// The shape of each layer of the cache.
    pub(super) cached: Vec<KvShape>,
    /// Which layers of the cache use the blocks of layers with a sliding window.
    pub(super) windowed: Vec<bool>,
}

pub(super) fn check(holds: bool, field: &str, what: impl FnOnce() -> String) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::invalid(field, what()))
    }
}

/// Checks that the tables and the shared layers fit.
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
    pub(super) fn new(
        shape: ModelShape,
        tables: PositionTables,
    ) -> Result<(Self, Vec<AttentionShape>)> {
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
