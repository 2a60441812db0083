//! Records a step's operations on a model's weights.

use super::activation::Activation;
use super::architecture::check;
use super::model::{Model, Weight, no_experts};
use super::program::{Program, QkvShape};
use crate::error::{Error, Result};

impl Model {
    /// Records the look-up of the step's tokens. Their rows are multiplied by `scale`.
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

    /// Begins the second half of a program, after the rows of `x` are sampled. It predicts the next tokens.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_begin_draft(&self, program: &mut Program, x: usize) -> Result<()> {
        program.begin_draft(x)
    }

    /// Records the look-up of the step's next tokens. Their rows are multiplied by `scale`.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_embed_next(
        &self,
        program: &mut Program,
        weight: usize,
        scale: f32,
    ) -> Result<usize> {
        let shape = self.linear_shape(weight)?;
        program.embed_next(weight, shape.cols, scale)
    }

    /// Records the concatenation of the columns of two values.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_join(&self, program: &mut Program, first: usize, second: usize) -> Result<usize> {
        program.join(first, second)
    }

    /// Ends the recording of a program that predicts tokens: for each row of `x`, the largest of the logits of `head`.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_draft(&self, program: &mut Program, x: usize, head: usize) -> Result<()> {
        program.finish_draft(x, head, self.linear_shape(head)?.cols)
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

    /// Records the norm of `residual + x * scale`. Returns it and the sum, which replaces `residual`.
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

    /// Records `residual + x * scale`, which replaces `residual`.
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

    /// Records `x * factor`, which replaces `x`.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_scale(&self, program: &mut Program, x: usize, factor: f32) -> Result<usize> {
        program.scale(x, factor)
    }

    /// Records each row of `x` times the sigmoid of its gate, which replaces `x`.
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

    /// Records norms, rotation and KV write. The norms are those of q, k and v, as wide as a head or as all heads.
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

    /// Records attention, with sinks and values added by distance if they are given.
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

    /// Records an activation: of a value's first half, times its second half (`gated`); or of the whole value, times the columns of
    /// another value from `factor.1` on, if there is one.
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

    /// Records a linear layer for each head: of the head's first columns. The next `passed` columns are copied.
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

    /// Records the norm of latents, the rotation of the elements after them and of the queries' last elements, and the KV write.
    /// Returns the queries.
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

    /// Records the output of the experts that `values.1` has chosen, for the rows of `values.0`.
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

    /// Records the selection of the sampled rows.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_rows(&self, program: &mut Program, x: usize) -> Result<usize> {
        program.gather_rows(x)
    }

    /// Ends the recording. `x` is the value that the program computes.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_result(&self, program: &mut Program, x: usize) -> Result<()> {
        program.finish(x)
    }
}
