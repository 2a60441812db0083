//! The operations of a recorded program, and the values that they read and write.

use super::activation::Activation;
use super::recurrent::{ConvGate, ScanRule};

/// How many rows a value has in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// One for each token.
    Tokens,
    /// One for each sampled row.
    Sampled,
}

/// A value that operations pass on: rows of `width` floats, `stride` apart, in a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Value {
    /// While recording a number of its own, which values that are changed in place hand on; then a buffer.
    pub(super) buffer: usize,
    pub(super) rows: Rows,
    pub(super) width: usize,
    pub(super) stride: usize,
}

/// One operation; `weight`s index the model's weights. Where `quantize` is set, the rows that are written are left as integers
/// too, for the linear layer that follows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Op {
    Embed {
        weight: usize,
        scale: f32,
        out: Value,
    },
    /// Rows of a table by where the tokens stand in their texts.
    EmbedPlaces {
        weight: usize,
        out: Value,
    },
    /// Rows of the tokens that follow the step's ones, once those are sampled.
    EmbedNext {
        weight: usize,
        scale: f32,
        out: Value,
    },
    /// The columns of one value, then those of the other.
    Join {
        first: Value,
        second: Value,
        out: Value,
    },
    /// Of each of the parts of a row, which are as wide as the weight.
    Norm {
        x: Value,
        groups: usize,
        weight: usize,
        out: Value,
        quantize: bool,
    },
    /// The sum stays in `residual`.
    AddNorm {
        x: Value,
        scale: f32,
        residual: Value,
        weight: usize,
        out: Value,
        quantize: bool,
    },
    /// In place.
    Add {
        x: Value,
        scale: f32,
        residual: Value,
    },
    /// In place.
    Scale {
        x: Value,
        factor: f32,
    },
    Linear {
        x: Value,
        weight: usize,
        out: Value,
        quantized: bool,
    },
    /// In place: each row times the sigmoid of its gate.
    GateRows {
        x: Value,
        gates: Value,
    },
    /// In place: the queries stay in `qkv`. The norms are those of q, k and v.
    RopeAndCache {
        qkv: Value,
        layer: usize,
        norms: [Option<usize>; 3],
    },
    Attention {
        queries: Value,
        layer: usize,
        sinks: Option<usize>,
        distances: Option<usize>,
        out: Value,
    },
    /// The activation of the first columns of `x`, times the columns of the factor from the second number on.
    Activate {
        x: Value,
        factor: Option<(Value, usize)>,
        activation: Activation,
        out: Value,
        quantize: bool,
    },
    GatherRows {
        x: Value,
        out: Value,
    },
    /// The numbers of the experts that each row goes to, then their weights.
    Route {
        x: Value,
        weight: usize,
        logits: Value,
        out: Value,
    },
    Experts {
        x: Value,
        routing: Value,
        weight: usize,
        out: Value,
    },
    /// Causal, of a layer with a recurrent state.
    Conv {
        x: Value,
        layer: usize,
        weight: usize,
        gate: ConvGate,
        out: Value,
    },
    /// Of each head's columns the first through its matrix, then the `passed` columns after them.
    Heads {
        x: Value,
        weight: usize,
        passed: usize,
        out: Value,
    },
    /// In place: the queries stay in `q`. The norm is that of the latents of `kv`.
    LatentCache {
        q: Value,
        kv: Value,
        layer: usize,
        norm: usize,
    },
    /// A recurrence with so many heads of keys.
    Scan {
        x: Value,
        gates: Value,
        layer: usize,
        weight: usize,
        rule: ScanRule,
        groups: usize,
        out: Value,
    },
}

impl Op {
    /// Calls `f` for each value that it reads or writes.
    pub(super) fn visit(&mut self, mut f: impl FnMut(&mut Value)) {
        match self {
            Self::Embed { out, .. }
            | Self::EmbedPlaces { out, .. }
            | Self::EmbedNext { out, .. } => {
                f(out);
            }
            Self::Join { first, second, out } => {
                f(first);
                f(second);
                f(out);
            }
            Self::Norm { x, out, .. }
            | Self::Linear { x, out, .. }
            | Self::Conv { x, out, .. }
            | Self::GatherRows { x, out }
            | Self::Heads { x, out, .. } => {
                f(x);
                f(out);
            }
            Self::AddNorm {
                x, residual, out, ..
            } => {
                f(x);
                f(residual);
                f(out);
            }
            Self::Add { x, residual, .. } => {
                f(x);
                f(residual);
            }
            Self::GateRows { x, gates } => {
                f(x);
                f(gates);
            }
            Self::Scan { x, gates, out, .. } => {
                f(x);
                f(gates);
                f(out);
            }
            Self::Scale { x, .. } => f(x),
            Self::RopeAndCache { qkv, .. } => f(qkv),
            Self::Attention { queries, out, .. } => {
                f(queries);
                f(out);
            }
            Self::Activate { x, factor, out, .. } => {
                f(x);
                if let Some((factor, _)) = factor {
                    f(factor);
                }
                f(out);
            }
            Self::LatentCache { q, kv, .. } => {
                f(q);
                f(kv);
            }
            Self::Route { x, logits, out, .. } => {
                f(x);
                f(logits);
                f(out);
            }
            Self::Experts {
                x, routing, out, ..
            } => {
                f(x);
                f(routing);
                f(out);
            }
        }
    }
}
