//! The packed experts of a layer.

use crate::cpu::activation::Activation;
use crate::cpu::isa::Isa;
use crate::cpu::linear::{Linear, Matrix};
use crate::cpu::pool::Pool;
use crate::error::{Error, Result};

/// The matrices of one expert, as stored. Either all experts of a layer have a gate, or none.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct ExpertMatrices<'a> {
    pub gate: Option<Matrix<'a>>,
    pub up: Matrix<'a>,
    pub down: Matrix<'a>,
}

/// One expert, packed.
pub(super) struct Expert {
    pub(super) gate: Option<Linear>,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// The loaded experts of a layer. Each computes `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate.
pub(in crate::cpu) struct ExpertsWeight {
    pub(super) experts: Vec<Expert>,
    pub(super) activation: Activation,
    /// Whether a router's weights multiply the experts' inputs instead of their outputs.
    pub(super) scaled_inputs: bool,
    pub(super) gated: bool,
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
    /// No experts yet.
    pub(in crate::cpu) fn new(activation: Activation, scaled_inputs: bool) -> Self {
        let none = Reads {
            integers: false,
            floats: false,
        };
        Self {
            experts: Vec::new(),
            activation,
            scaled_inputs,
            gated: true,
            hidden: 0,
            inner: 0,
            inputs: none,
            inners: none,
        }
    }

    /// Packs more experts, each matrix on one thread of the pool.
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
            self.gated = first.gate.is_some();
            (self.inner, self.hidden) = (first.up.rows, first.up.columns);
        }
        let (inner, hidden) = (self.inner, self.hidden);
        let fits = |given: &ExpertMatrices| {
            let shape = |matrix: &Matrix| (matrix.rows, matrix.columns);
            let inputs = || given.gate.iter().chain([&given.up]);
            let biased = inputs().any(|matrix| matrix.bias.is_some());
            given.gate.is_some() == self.gated
                && inputs().all(|matrix| shape(matrix) == (inner, hidden))
                && shape(&given.down) == (hidden, inner)
                && !(self.scaled_inputs && biased)
        };
        if !experts.iter().all(fits) {
            return Err(Error::invalid(
                "model",
                format!(
                    "the matrices of all experts must fit those of shape [{inner}, {hidden}] of the first, have gates or not as it has, and no biases where inputs are scaled"
                ),
            ));
        }
        let matrices: Vec<Matrix> = experts
            .iter()
            .flat_map(|expert| expert.gate.into_iter().chain([expert.up, expert.down]))
            .collect();
        self.push(Linear::pack_each(isa, pool, &matrices)?);
        Ok(())
    }

    /// Takes all experts as packed layers: the gate (if they are `gated`), up and down of each. Returns whether their shapes fit
    /// each other.
    pub(in crate::cpu) fn take(&mut self, layers: Vec<Linear>, gated: bool) -> bool {
        let Some(first) = layers.first() else {
            return false;
        };
        let each = if gated { 3 } else { 2 };
        let shape = (first.out_features(), first.in_features());
        let fits = |(at, layer): (usize, &Linear)| {
            let is_down = at % each == each - 1;
            let wanted = if is_down { (shape.1, shape.0) } else { shape };
            (layer.out_features(), layer.in_features()) == wanted
        };
        if !layers.len().is_multiple_of(each) || !layers.iter().enumerate().all(fits) {
            return false;
        }
        self.gated = gated;
        (self.inner, self.hidden) = shape;
        self.experts.clear();
        self.push(layers);
        true
    }

    fn push(&mut self, layers: Vec<Linear>) {
        let mut layers = layers.into_iter();
        let each = if self.gated { 3 } else { 2 };
        for _ in 0..layers.len() / each {
            let gate = if self.gated { layers.next() } else { None };
            if let (Some(up), Some(down)) = (layers.next(), layers.next()) {
                self.experts.push(Expert { gate, up, down });
            }
        }
        let each = self.experts.iter();
        self.inputs = Reads::of(each.flat_map(|expert| expert.gate.iter().chain([&expert.up])));
        self.inners = Reads::of(self.experts.iter().map(|expert| &expert.down));
    }

    /// All matrices, in the order in which they are [taken](Self::take).
    pub(in crate::cpu) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let each = self.experts.iter_mut();
        each.flat_map(|expert| {
            let gate = expert.gate.iter_mut();
            gate.chain([&mut expert.up, &mut expert.down])
        })
    }

    pub(in crate::cpu) fn bytes(&self) -> usize {
        let each = self.experts.iter();
        each.flat_map(|expert| expert.gate.iter().chain([&expert.up, &expert.down]))
            .map(Linear::bytes)
            .sum()
    }

    /// Number of experts.
    pub(in crate::cpu) fn count(&self) -> usize {
        self.experts.len()
    }
}
