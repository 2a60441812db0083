//! A model's operations, recorded once and run in every step: what each reads and writes, and in which buffer.

use crate::error::{Error, Result};

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
        out: Value,
    },
    RmsNorm {
        x: Value,
        weight: usize,
        eps: f32,
        out: Value,
        quantize: bool,
    },
    /// The sum stays in `residual`.
    AddRmsNorm {
        x: Value,
        residual: Value,
        weight: usize,
        eps: f32,
        out: Value,
        quantize: bool,
    },
    Linear {
        x: Value,
        weight: usize,
        out: Value,
        quantized: bool,
    },
    /// In place: the queries stay in `qkv`.
    RopeAndCache {
        qkv: Value,
        layer: usize,
        norms: Option<(usize, usize)>,
    },
    Attention {
        queries: Value,
        layer: usize,
        out: Value,
    },
    SiluMul {
        x: Value,
        out: Value,
        quantize: bool,
    },
    GatherRows {
        x: Value,
        out: Value,
    },
}

/// A recorded list of operations. Values are handles; an operation that consumes one gives its buffer back for later ones.
#[derive(Debug, Default, Clone)]
pub struct Program {
    pub(super) ops: Vec<Op>,
    /// Floats of each buffer for a row of the step.
    pub(super) buffers: Vec<usize>,
    values: Vec<Value>,
    free: Vec<usize>,
    /// What the program leaves behind.
    pub(super) result: Option<Value>,
}

/// The shape of a linear layer's weight, as the recorder must know it.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinearShape {
    pub(super) out: usize,
    pub(super) cols: usize,
    /// Whether it reads quantized rows.
    pub(super) quantized: bool,
}

impl Program {
    fn push(&mut self, rows: Rows, width: usize) -> (usize, Value) {
        let buffer = self.free.pop().unwrap_or_else(|| {
            self.buffers.push(0);
            self.buffers.len() - 1
        });
        self.buffers[buffer] = self.buffers[buffer].max(width);
        let value = Value {
            buffer,
            rows,
            width,
            stride: width,
        };
        self.values.push(value);
        (self.values.len() - 1, value)
    }

    fn consume(&mut self, value: Value) {
        self.free.push(value.buffer);
    }

    /// The value of a handle.
    ///
    /// # Errors
    /// `invalid_value` for one that no operation gave.
    pub(super) fn value(&self, handle: usize) -> Result<Value> {
        let known = self.values.get(handle).copied();
        known.ok_or_else(|| Error::invalid("program", format!("there is no value {handle}")))
    }

    fn expect(&self, handle: usize, what: &str, width: usize) -> Result<Value> {
        let value = self.value(handle)?;
        if value.width == width {
            return Ok(value);
        }
        let given = value.width;
        Err(Error::invalid(
            "program",
            format!("{what} takes rows of {width}, but rows of {given} were given"),
        ))
    }

    pub(super) fn embed(&mut self, weight: usize, width: usize) -> usize {
        let (handle, out) = self.push(Rows::Tokens, width);
        self.ops.push(Op::Embed { weight, out });
        handle
    }

    pub(super) fn rms_norm(
        &mut self,
        x: usize,
        weight: usize,
        width: usize,
        eps: f32,
    ) -> Result<usize> {
        let x = self.expect(x, "rms_norm", width)?;
        let (handle, out) = self.push(x.rows, width);
        self.ops.push(Op::RmsNorm {
            x,
            weight,
            eps,
            out,
            quantize: false,
        });
        Ok(handle)
    }

    /// Gives the norm; the sum keeps the handle of `residual`.
    pub(super) fn add_rms_norm(
        &mut self,
        x: usize,
        residual: usize,
        weight: usize,
        width: usize,
        eps: f32,
    ) -> Result<usize> {
        let (x, residual) = (
            self.expect(x, "add_rms_norm", width)?,
            self.expect(residual, "add_rms_norm", width)?,
        );
        let (handle, out) = self.push(x.rows, width);
        self.ops.push(Op::AddRmsNorm {
            x,
            residual,
            weight,
            eps,
            out,
            quantize: false,
        });
        self.consume(x);
        Ok(handle)
    }

    pub(super) fn linear(&mut self, x: usize, weight: usize, shape: LinearShape) -> Result<usize> {
        let x = self.expect(x, "linear", shape.cols)?;
        let quantized = shape.quantized && self.quantize_before(x);
        let (handle, out) = self.push(x.rows, shape.out);
        self.ops.push(Op::Linear {
            x,
            weight,
            out,
            quantized,
        });
        self.consume(x);
        Ok(handle)
    }

    /// Lets the last operation, if it writes `x` row by row, quantize what it writes.
    fn quantize_before(&mut self, x: Value) -> bool {
        match self.ops.last_mut() {
            Some(
                Op::RmsNorm { out, quantize, .. }
                | Op::AddRmsNorm { out, quantize, .. }
                | Op::SiluMul { out, quantize, .. },
            ) if *out == x => {
                *quantize = true;
                true
            }
            _ => false,
        }
    }

    /// Gives the queries, `q_size` of each row.
    pub(super) fn rope_and_cache(
        &mut self,
        qkv: usize,
        layer: usize,
        norms: Option<(usize, usize)>,
        (q_size, kv_size): (usize, usize),
    ) -> Result<usize> {
        let qkv = self.expect(qkv, "rope_and_cache", q_size + 2 * kv_size)?;
        self.ops.push(Op::RopeAndCache { qkv, layer, norms });
        self.values.push(Value {
            width: q_size,
            ..qkv
        });
        Ok(self.values.len() - 1)
    }

    pub(super) fn attention(&mut self, queries: usize, layer: usize) -> Result<usize> {
        let queries = self.value(queries)?;
        let (handle, out) = self.push(queries.rows, queries.width);
        self.ops.push(Op::Attention {
            queries,
            layer,
            out,
        });
        self.consume(queries);
        Ok(handle)
    }

    pub(super) fn silu_mul(&mut self, x: usize) -> Result<usize> {
        let x = self.value(x)?;
        let (handle, out) = self.push(x.rows, x.width / 2);
        self.ops.push(Op::SiluMul {
            x,
            out,
            quantize: false,
        });
        self.consume(x);
        Ok(handle)
    }

    pub(super) fn gather_rows(&mut self, x: usize) -> Result<usize> {
        let x = self.value(x)?;
        let (handle, out) = self.push(Rows::Sampled, x.width);
        self.ops.push(Op::GatherRows { x, out });
        self.consume(x);
        Ok(handle)
    }

    pub(super) fn finish(&mut self, result: usize) -> Result<()> {
        self.result = Some(self.value(result)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consumed_buffers_are_used_again_and_norms_before_linear_layers_quantize() {
        let shape = |out, cols| LinearShape {
            out,
            cols,
            quantized: true,
        };
        let mut program = Program::default();
        let states = program.embed(0, 8);
        let normed = program.rms_norm(states, 1, 8, 1e-5).unwrap();
        let qkv = program.linear(normed, 2, shape(24, 8)).unwrap();
        let queries = program.rope_and_cache(qkv, 0, None, (8, 8)).unwrap();
        let attended = program.attention(queries, 0).unwrap();
        let output = program.linear(attended, 3, shape(8, 8)).unwrap();
        let normed = program.add_rms_norm(output, states, 4, 8, 1e-5).unwrap();
        program.finish(normed).unwrap();
        // States, qkv and one more at a time: norm, attention and their successors take turns.
        assert_eq!(program.buffers.len(), 3);
        assert!(program.buffers.iter().max() == Some(&24));
        let quantized: Vec<bool> = program
            .ops
            .iter()
            .filter_map(|op| match op {
                Op::Linear { quantized, .. } => Some(*quantized),
                _ => None,
            })
            .collect();
        assert_eq!(quantized, [true, false]);
    }

    #[test]
    fn wrong_widths_and_unknown_values_are_refused() {
        let mut program = Program::default();
        let states = program.embed(0, 8);
        let error = program.rms_norm(states, 1, 9, 1e-5).unwrap_err();
        assert!(
            error.message.contains("rows of 9, but rows of 8"),
            "{error}"
        );
        assert!(
            program
                .attention(7, 0)
                .unwrap_err()
                .message
                .contains("no value 7")
        );
    }
}
