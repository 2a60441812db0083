//! The operations of a recorded program, and the values that they read and write.

use super::activation::Activation;
use super::recurrent::{ConvGate, ScanRule};

/// Number of rows of a value in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// One for each token.
    Tokens,
    /// One for each sampled row.
    Sampled,
}

/// A value that operations read and write: rows of `width` floats in a buffer, `stride` apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Value {
    /// While recording, an id that a value changed in place keeps. Afterwards, the index of its buffer.
    pub(super) buffer: usize,
    pub(super) rows: Rows,
    pub(super) width: usize,
    pub(super) stride: usize,
}

/// One operation. A `weight` is an index of the model's weights. If `quantize` is set, the operation also stores its rows as
/// integers, for the linear layer that follows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Op {
    Embed {
        weight: usize,
        scale: f32,
        out: Value,
    },
    /// Looks up rows of a table by the tokens' places in their texts.
    EmbedPlaces {
        weight: usize,
        out: Value,
    },
    /// Looks up the rows of the step's next tokens, once they are sampled.
    EmbedNext {
        weight: usize,
        scale: f32,
        out: Value,
    },
    /// The columns of one value, followed by those of another.
    Join {
        first: Value,
        second: Value,
        out: Value,
    },
    /// Norms each part of a row. A part is as wide as the weight.
    Norm {
        x: Value,
        groups: usize,
        weight: usize,
        out: Value,
        quantize: bool,
    },
    /// The sum is written to `residual`.
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
    /// In place: multiplies each row by the sigmoid of its gate.
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
    /// The activation of the first columns of `x`, times the factor's columns from the given index on.
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
    /// The numbers of each row's experts, followed by their weights.
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
    /// A causal convolution, in a layer with a recurrent state.
    Conv {
        x: Value,
        layer: usize,
        weight: usize,
        gate: ConvGate,
        out: Value,
    },
    /// Multiplies the first columns of each head by its matrix, and copies the next `passed` columns.
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
    /// Calls `f` for each value that the operation reads or writes.
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
