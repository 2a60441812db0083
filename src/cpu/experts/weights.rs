//! The experts of a layer, packed.

use crate::cpu::activation::Activation;
use crate::cpu::isa::Isa;
use crate::cpu::linear::{Linear, Matrix};
use crate::cpu::pool::Pool;
use crate::error::{Error, Result};

/// The matrices of one expert, as stored.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct ExpertMatrices<'a> {
    pub gate: Matrix<'a>,
    pub up: Matrix<'a>,
    pub down: Matrix<'a>,
}

/// One expert, packed.
pub(super) struct Expert {
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// The experts of a layer, loaded: each gives `down(activation(gate(x)) * up(x))`.
pub(in crate::cpu) struct ExpertsWeight {
    pub(super) experts: Vec<Expert>,
    pub(super) activation: Activation,
    /// Whether what a router gives is multiplied with an expert's input, and not with its output.
    pub(super) scaled_inputs: bool,
    pub(in crate::cpu) hidden: usize,
    pub(super) inner: usize,
    pub(super) inputs: Reads,
    pub(super) inners: Reads,
}

/// Whether some of the matrices that read the same rows multiply integers, and whether some multiply floats.
#[derive(Clone, Copy)]
pub(super) struct Reads {
    pub(super) integers: bool,
    pub(super) floats: bool,
}

impl Reads {
    fn of<'a>(matrices: impl Iterator<Item = &'a Linear>) -> Self {
        let (integers, floats): (Vec<_>, Vec<_>) = matrices.partition(|one| one.is_quantized());
        Self {
            integers: !integers.is_empty(),
            floats: !floats.is_empty(),
        }
    }
}

impl ExpertsWeight {
    /// Without any yet.
    pub(in crate::cpu) fn new(activation: Activation, scaled_inputs: bool) -> Self {
        let none = Reads {
            integers: false,
            floats: false,
        };
        Self {
            experts: Vec::new(),
            activation,
            scaled_inputs,
            hidden: 0,
            inner: 0,
            inputs: none,
            inners: none,
        }
    }

    /// Packs further experts, each matrix on one thread of the pool.
    ///
    /// # Errors
    /// `invalid_value` for matrices that do not fit each other, those of the experts before or their bytes.
    pub(in crate::cpu) fn extend(
        &mut self,
        isa: Isa,
        pool: &Pool,
        experts: &[ExpertMatrices],
    ) -> Result<()> {
        if let ([], Some(first)) = (self.experts.as_slice(), experts.first()) {
            (self.inner, self.hidden) = (first.gate.rows, first.gate.columns);
        }
        let (inner, hidden) = (self.inner, self.hidden);
        let fits = |given: &ExpertMatrices| {
            let shape = |matrix: &Matrix| (matrix.rows, matrix.columns);
            let biased = given.gate.bias.is_some() || given.up.bias.is_some();
            shape(&given.gate) == (inner, hidden)
                && shape(&given.up) == (inner, hidden)
                && shape(&given.down) == (hidden, inner)
                && !(self.scaled_inputs && biased)
        };
        if !experts.iter().all(fits) {
            return Err(Error::invalid(
                "model",
                format!(
                    "the matrices of all experts must fit gates of shape [{inner}, {hidden}], and have no biases where inputs are scaled"
                ),
            ));
        }
        let matrices: Vec<Matrix> = experts
            .iter()
            .flat_map(|expert| [expert.gate, expert.up, expert.down])
            .collect();
        let mut packed = Linear::pack_each(isa, pool, &matrices)?.into_iter();
        while let (Some(gate), Some(up), Some(down)) = (packed.next(), packed.next(), packed.next())
        {
            self.experts.push(Expert { gate, up, down });
        }
        let each = self.experts.iter();
        self.inputs = Reads::of(each.flat_map(|expert| [&expert.gate, &expert.up]));
        self.inners = Reads::of(self.experts.iter().map(|expert| &expert.down));
        Ok(())
    }

    pub(in crate::cpu) fn bytes(&self) -> usize {
        let each = self.experts.iter();
        each.flat_map(|expert| [&expert.gate, &expert.up, &expert.down])
            .map(Linear::bytes)
            .sum()
    }

    /// How many there are.
    pub(in crate::cpu) fn count(&self) -> usize {
        self.experts.len()
    }
}
