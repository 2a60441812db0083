//! What a model's recurrent layers do, as it is recorded.

use super::super::model::{Model, Weight};
use super::super::op::Op;
use super::super::program::Program;
use super::conv::{ConvGate, ConvWeight, MAX_KERNEL};
use super::scan::{MAX_ROWS, ScanRule, ScanWeight};
use super::state::RecurrentShape;
use crate::error::{Error, Result};

fn refused<T>(what: String) -> Result<T> {
    Err(Error::invalid("program", what))
}

impl Model {
    /// Takes the weights `[channels][kernel]` of a causal convolution in; gives their number.
    ///
    /// # Errors
    /// `invalid_value` for a kernel that is none, or weights or a bias that do not fit it.
    pub fn add_conv(
        &mut self,
        weight: &[f32],
        bias: Option<Vec<f32>>,
        kernel: usize,
    ) -> Result<usize> {
        if !(1..=MAX_KERNEL).contains(&kernel)
            || weight.is_empty()
            || !weight.len().is_multiple_of(kernel)
        {
            let values = weight.len();
            return refused(format!(
                "a convolution sees 1 to {MAX_KERNEL} tokens, but {values} weights for {kernel} were given"
            ));
        }
        let channels = weight.len() / kernel;
        if bias.as_ref().is_some_and(|bias| bias.len() != channels) {
            return refused(format!(
                "the bias of a convolution must have {channels} numbers"
            ));
        }
        self.weights
            .push(Weight::Conv(ConvWeight::new(weight, bias, kernel)));
        Ok(self.weights.len() - 1)
    }

    fn recurrent_shape(&self, layer: usize) -> Result<RecurrentShape> {
        let layers = &self.architecture.shape.recurrent;
        match layers.get(layer) {
            Some(shape) => Ok(*shape),
            None => refused(format!(
                "recurrent layers lie in [0, {}), but {layer} was given",
                layers.len()
            )),
        }
    }

    /// Records a causal convolution of a recurrent layer.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_conv(
        &self,
        program: &mut Program,
        x: usize,
        layer: usize,
        weight: usize,
        gate: ConvGate,
    ) -> Result<usize> {
        let shape = self.recurrent_shape(layer)?;
        let Some(Weight::Conv(conv)) = self.weights.get(weight) else {
            return refused(format!("weight {weight} is not a convolution"));
        };
        if (conv.channels, conv.kernel) != (shape.channels, shape.kernel) {
            return refused(format!(
                "the convolution does not fit recurrent layer {layer}"
            ));
        }
        let width = if gate == ConvGate::Inputs { 3 } else { 1 } * conv.channels;
        program.recurrent(x, width, conv.channels, |x, out| Op::Conv {
            x,
            layer,
            weight,
            gate,
            out,
        })
    }

    /// Takes the numbers of each head of a recurrence in: `decay`, which is negative, the bias of the time step and its limits, and
    /// what of its input is added to the output; gives their number.
    ///
    /// # Errors
    /// `invalid_value` for numbers that are not as many, or limits that are none.
    pub fn add_scan(
        &mut self,
        decay: Vec<f32>,
        bias: Vec<f32>,
        skip: Option<Vec<f32>>,
        limits: (f32, f32),
    ) -> Result<usize> {
        let heads = decay.len();
        if bias.len() != heads || skip.as_ref().is_some_and(|skip| skip.len() != heads) {
            return refused(format!(
                "a recurrence of {heads} heads needs as many of each number"
            ));
        }
        let (least, most) = limits;
        if least.is_nan() || most.is_nan() || least > most {
            return refused(format!("the limits {limits:?} of the time step are none"));
        }
        self.weights.push(Weight::Scan(ScanWeight {
            decay,
            bias,
            skip,
            limits,
        }));
        Ok(self.weights.len() - 1)
    }

    /// Records a recurrence of a layer over rows `x`, with its gates.
    ///
    /// # Errors
    /// As [`Self::record_embed`].
    pub fn record_scan(
        &self,
        program: &mut Program,
        (x, gates): (usize, usize),
        layer: usize,
        weight: usize,
        rule: ScanRule,
    ) -> Result<usize> {
        let shape = self.recurrent_shape(layer)?;
        let heads = match self.weights.get(weight) {
            Some(Weight::Scan(scan)) => scan.decay.len(),
            _ => return refused(format!("weight {weight} is not a recurrence")),
        };
        let inner = heads * shape.columns;
        let keys = program.value(x)?.width.saturating_sub(inner) / 2;
        let groups = keys / shape.rows.max(1);
        let fits = heads == shape.heads
            && (1..=MAX_ROWS).contains(&shape.rows)
            && groups > 0
            && heads.is_multiple_of(groups);
        if !fits {
            return refused(format!(
                "the recurrence does not fit recurrent layer {layer}"
            ));
        }
        let gate_width = match rule {
            ScanRule::Delta { .. } => 2 * heads,
            ScanRule::Mamba => heads,
        };
        let gates = program.tokens(gates, gate_width)?;
        let width = 2 * groups * shape.rows + inner;
        program.recurrent(x, width, inner, |x, out| Op::Scan {
            x,
            gates,
            layer,
            weight,
            rule,
            groups,
            out,
        })
    }
}
