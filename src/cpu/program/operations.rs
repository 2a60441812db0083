//! The recording of each operation.

use super::Program;
use crate::cpu::activation::Activation;
use crate::cpu::op::{Op, Rows, Value};
use crate::error::{Error, Result};

/// The shape of a linear layer's weight, as the recorder must know it.
#[derive(Debug, Clone, Copy)]
pub(in crate::cpu) struct LinearShape {
    pub(in crate::cpu) out: usize,
    pub(in crate::cpu) cols: usize,
    /// Whether it reads quantized rows.
    pub(in crate::cpu) quantized: bool,
}

/// What a layer's attention takes.
#[derive(Debug, Clone, Copy)]
pub(in crate::cpu) struct QkvShape {
    pub(in crate::cpu) q_size: usize,
    /// 0 where the layer reads keys and values of another.
    pub(in crate::cpu) kv_size: usize,
}

impl Program {
    /// A value and one of the same shape that is to be changed in place.
    fn pair(&self, x: usize, residual: usize, what: &str) -> Result<(Value, Value)> {
        let x = self.value(x)?;
        let residual = self.expect(residual, what, x.width)?;
        if x.rows == residual.rows && x.buffer != residual.buffer {
            return Ok((x, residual));
        }
        Err(Error::invalid(
            "program",
            format!("{what} takes two values with as many rows"),
        ))
    }

    pub(in crate::cpu) fn embed(&mut self, weight: usize, width: usize, scale: f32) -> usize {
        let (handle, out) = self.push(Rows::Tokens, width);
        self.ops.push(Op::Embed { weight, scale, out });
        handle
    }

    pub(in crate::cpu) fn embed_places(&mut self, weight: usize, width: usize) -> usize {
        let (handle, out) = self.push(Rows::Tokens, width);
        self.ops.push(Op::EmbedPlaces { weight, out });
        handle
    }

    /// Begins what is computed after rows were sampled from the states `x`.
    pub(in crate::cpu) fn begin_draft(&mut self, x: usize) -> Result<()> {
        let x = self.value(x)?;
        if x.rows != Rows::Sampled || self.sampled.is_some() {
            let message = "a program samples once, from the sampled rows";
            return Err(Error::invalid("program", message));
        }
        self.sampled = Some((x, self.ops.len()));
        Ok(())
    }

    pub(in crate::cpu) fn embed_next(
        &mut self,
        weight: usize,
        width: usize,
        scale: f32,
    ) -> Result<usize> {
        if self.sampled.is_none() {
            let message = "the tokens that come next are not sampled yet";
            return Err(Error::invalid("program", message));
        }
        let (handle, out) = self.push(Rows::Tokens, width);
        self.ops.push(Op::EmbedNext { weight, scale, out });
        Ok(handle)
    }

    /// Gives the columns of `first`, then those of `second`.
    pub(in crate::cpu) fn join(&mut self, first: usize, second: usize) -> Result<usize> {
        let (first, second) = (self.value(first)?, self.value(second)?);
        let whole = |value: Value| value.width == value.stride;
        if first.rows != second.rows || !whole(first) || !whole(second) {
            let message = "join takes two values with as many rows";
            return Err(Error::invalid("program", message));
        }
        let (handle, out) = self.push(first.rows, first.width + second.width);
        self.ops.push(Op::Join { first, second, out });
        Ok(handle)
    }

    /// A norm of each `width` columns.
    pub(in crate::cpu) fn norm(
        &mut self,
        handle: usize,
        weight: usize,
        width: usize,
    ) -> Result<usize> {
        let x = self.value(handle)?;
        let groups = x.width / width;
        if groups * width != x.width {
            self.expect(handle, "norm", width)?;
        }
        let (handle, out) = self.push(x.rows, x.width);
        self.ops.push(Op::Norm {
            x,
            groups,
            weight,
            out,
            quantize: false,
        });
        Ok(handle)
    }

    /// Gives the norm and the sum.
    pub(in crate::cpu) fn add_norm(
        &mut self,
        (x, residual): (usize, usize),
        scale: f32,
        weight: usize,
        width: usize,
    ) -> Result<(usize, usize)> {
        self.expect(x, "add_norm", width)?;
        let (x, taken) = self.pair(x, residual, "add_norm")?;
        let (handle, out) = self.push(x.rows, width);
        self.ops.push(Op::AddNorm {
            x,
            scale,
            residual: taken,
            weight,
            out,
            quantize: false,
        });
        Ok((handle, self.changed(residual, taken)))
    }

    /// Gives the sum.
    pub(in crate::cpu) fn add(&mut self, x: usize, residual: usize, scale: f32) -> Result<usize> {
        let (x, taken) = self.pair(x, residual, "add")?;
        self.ops.push(Op::Add {
            x,
            scale,
            residual: taken,
        });
        Ok(self.changed(residual, taken))
    }

    pub(in crate::cpu) fn scale(&mut self, handle: usize, factor: f32) -> Result<usize> {
        let x = self.value(handle)?;
        self.ops.push(Op::Scale { x, factor });
        Ok(self.changed(handle, x))
    }

    pub(in crate::cpu) fn gate_rows(&mut self, handle: usize, gates: usize) -> Result<usize> {
        let (x, gates) = (self.value(handle)?, self.expect(gates, "gate_rows", 1)?);
        if x.rows != gates.rows || x.buffer == gates.buffer {
            let message = "gate_rows takes a gate for each row";
            return Err(Error::invalid("program", message));
        }
        self.ops.push(Op::GateRows { x, gates });
        Ok(self.changed(handle, x))
    }

    pub(in crate::cpu) fn linear(
        &mut self,
        x: usize,
        weight: usize,
        shape: LinearShape,
    ) -> Result<usize> {
        let x = self.expect(x, "linear", shape.cols)?;
        let quantized = shape.quantized && self.quantize_before(x);
        let (handle, out) = self.push(x.rows, shape.out);
        self.ops.push(Op::Linear {
            x,
            weight,
            out,
            quantized,
        });
        Ok(handle)
    }

    /// Lets the last operation, if it writes `x` row by row, quantize what it writes.
    fn quantize_before(&mut self, x: Value) -> bool {
        if self
            .sampled
            .is_some_and(|(_, first)| first == self.ops.len())
        {
            // The head is computed in between, and quantizes its own rows.
            return false;
        }
        match self.ops.last_mut() {
            Some(
                Op::Norm {
                    out,
                    quantize,
                    groups: 1,
                    ..
                }
                | Op::AddNorm { out, quantize, .. }
                | Op::Activate { out, quantize, .. },
            ) if *out == x => {
                *quantize = true;
                true
            }
            _ => false,
        }
    }

    /// Gives the queries, `q_size` of each row.
    pub(in crate::cpu) fn rope_and_cache(
        &mut self,
        handle: usize,
        layer: usize,
        norms: [Option<usize>; 3],
        shape: QkvShape,
    ) -> Result<usize> {
        let width = shape.q_size + 2 * shape.kv_size;
        let qkv = self.expect(handle, "rope_and_cache", width)?;
        self.ops.push(Op::RopeAndCache { qkv, layer, norms });
        let queries = Value {
            width: shape.q_size,
            ..qkv
        };
        Ok(self.changed(handle, queries))
    }

    pub(in crate::cpu) fn attention(
        &mut self,
        queries: usize,
        layer: usize,
        (sinks, distances): (Option<usize>, Option<usize>),
        q_size: usize,
    ) -> Result<usize> {
        let queries = self.expect(queries, "attention", q_size)?;
        let (handle, out) = self.push(queries.rows, queries.width);
        self.ops.push(Op::Attention {
            queries,
            layer,
            sinks,
            distances,
            out,
        });
        Ok(handle)
    }

    /// The activation of `x`: of its first half times the second (`gated`), or of all of it times columns of another value from
    /// `factor.1` on.
    pub(in crate::cpu) fn activate(
        &mut self,
        x: usize,
        activation: Activation,
        gated: bool,
        factor: Option<(usize, usize)>,
    ) -> Result<usize> {
        let x = self.value(x)?;
        let width = if gated { x.width / 2 } else { x.width };
        let factor = match factor {
            Some((factor, start)) => {
                let factor = self.value(factor)?;
                if factor.rows != x.rows || start + width > factor.width {
                    let given = factor.width;
                    return Err(Error::invalid(
                        "program",
                        format!(
                            "activate takes {width} columns from {start} on of as many rows, but rows of {given} were given"
                        ),
                    ));
                }
                Some((factor, start))
            }
            None => gated.then_some((x, width)),
        };
        let (handle, out) = self.push(x.rows, width);
        self.ops.push(Op::Activate {
            x,
            factor,
            activation,
            out,
            quantize: false,
        });
        Ok(handle)
    }

    /// A value of a row for each token, as recurrent layers take it.
    pub(in crate::cpu) fn tokens(&self, handle: usize, width: usize) -> Result<Value> {
        let value = self.expect(handle, "a recurrent layer", width)?;
        if value.rows != Rows::Tokens {
            let message = "a recurrent layer takes a row of each token";
            return Err(Error::invalid("program", message));
        }
        Ok(value)
    }

    /// An operation of a recurrent layer on rows of `width` tokens, which gives rows of `out` numbers.
    pub(in crate::cpu) fn recurrent(
        &mut self,
        x: usize,
        width: usize,
        out: usize,
        op: impl FnOnce(Value, Value) -> Op,
    ) -> Result<usize> {
        let x = self.tokens(x, width)?;
        let (handle, out) = self.push(x.rows, out);
        self.ops.push(op(x, out));
        Ok(handle)
    }

    pub(in crate::cpu) fn gather_rows(&mut self, x: usize) -> Result<usize> {
        let x = self.value(x)?;
        let (handle, out) = self.push(Rows::Sampled, x.width);
        self.ops.push(Op::GatherRows { x, out });
        Ok(handle)
    }

    /// Gives the choice of `top_k` experts for each row.
    pub(in crate::cpu) fn route(
        &mut self,
        x: usize,
        weight: usize,
        (experts, columns, top_k): (usize, usize, usize),
    ) -> Result<usize> {
        let x = self.expect(x, "route", columns)?;
        let (_, logits) = self.push(x.rows, experts);
        let (handle, out) = self.push(x.rows, 2 * top_k);
        self.ops.push(Op::Route {
            x,
            weight,
            logits,
            out,
        });
        Ok(handle)
    }

    /// Gives what the chosen experts make of each row of `x`.
    pub(in crate::cpu) fn experts(
        &mut self,
        (x, routing): (usize, usize),
        weight: usize,
        (experts, width): (usize, usize),
    ) -> Result<usize> {
        let (x, routing) = (self.expect(x, "experts", width)?, self.value(routing)?);
        let chosen = self.ops.iter().find_map(|op| match op {
            Op::Route { logits, out, .. } if *out == routing => Some(logits.width),
            _ => None,
        });
        if x.rows != routing.rows || chosen != Some(experts) {
            return Err(Error::invalid(
                "program",
                format!("experts takes a choice among its {experts} for as many rows"),
            ));
        }
        let (handle, out) = self.push(x.rows, width);
        self.ops.push(Op::Experts {
            x,
            routing,
            weight,
            out,
        });
        Ok(handle)
    }

    /// Gives what each of so many heads makes of its columns of `x`, and the `passed` columns that follow them.
    pub(in crate::cpu) fn heads(
        &mut self,
        x: usize,
        weight: usize,
        (heads, inputs, outputs): (usize, usize, usize),
        passed: usize,
    ) -> Result<usize> {
        let x = self.value(x)?;
        if !x.width.is_multiple_of(heads) || x.width / heads < inputs + passed {
            let given = x.width;
            return Err(Error::invalid(
                "program",
                format!(
                    "heads takes at least {inputs} and {passed} columns for each of {heads} heads, but rows of {given} were given"
                ),
            ));
        }
        let (handle, out) = self.push(x.rows, heads * (outputs + passed));
        self.ops.push(Op::Heads {
            x,
            weight,
            passed,
            out,
        });
        Ok(handle)
    }

    /// Gives the queries.
    pub(in crate::cpu) fn latent_cache(
        &mut self,
        (q, kv): (usize, usize),
        layer: usize,
        norm: usize,
        (q_size, kv_size): (usize, usize),
    ) -> Result<usize> {
        let queries = self.expect(q, "latent_cache", q_size)?;
        let latents = self.expect(kv, "latent_cache", kv_size)?;
        if queries.rows != latents.rows || queries.buffer == latents.buffer {
            return Err(Error::invalid(
                "program",
                "latent_cache takes two values with as many rows",
            ));
        }
        self.ops.push(Op::LatentCache {
            q: queries,
            kv: latents,
            layer,
            norm,
        });
        self.values[kv] = None;
        Ok(self.changed(q, queries))
    }
}
