//! Routers and experts, as Python gives them.

use pyo3::prelude::*;

use super::cpu_weights::{GivenPart, StoredPart};
use crate::cpu::{ExpertMatrices, Router};
use crate::error::{Error, Result};

/// `lmserve.model.router.Router`.
#[derive(FromPyObject)]
pub(super) struct GivenRouter {
    kind: String,
    pub(super) top_k: usize,
    normalized: bool,
    pub(super) factor: f32,
    groups: usize,
    top_groups: usize,
    jitter: f32,
    tiny: f32,
}

impl GivenRouter {
    pub(super) fn kind(&self) -> Result<Router> {
        let (groups, top_groups) = (self.groups, self.top_groups);
        match self.kind.as_str() {
            "softmax" => Ok(Router::Softmax {
                normalized: self.normalized,
            }),
            "softmax_of_chosen" => Ok(Router::SoftmaxOfChosen),
            "sigmoid" => Ok(Router::Sigmoid),
            "corrected_sigmoid" => Ok(Router::CorrectedSigmoid {
                groups,
                top_groups,
                normalized: self.normalized,
                tiny: self.tiny,
            }),
            "grouped_softmax" => Ok(Router::GroupedSoftmax { groups, top_groups }),
            "sparse_mixer" => Ok(Router::SparseMixer {
                jitter: self.jitter,
            }),
            given => Err(Error::invalid(
                "router",
                format!(
                    "must be softmax, softmax_of_chosen, sigmoid, corrected_sigmoid, grouped_softmax or sparse_mixer, but {given} was given"
                ),
            )),
        }
    }
}

/// The gate, if it has one, up and down of one expert.
pub(super) type GivenExpert<'py> = (Option<GivenPart<'py>>, GivenPart<'py>, GivenPart<'py>);

/// The same, their arrays taken.
pub(super) struct StoredExpert {
    gate: Option<StoredPart>,
    up: StoredPart,
    down: StoredPart,
}

impl StoredExpert {
    pub(super) fn new((gate, up, down): GivenExpert, quantize: Option<&str>) -> PyResult<Self> {
        Ok(Self {
            gate: gate
                .map(|gate| StoredPart::new(gate, quantize))
                .transpose()?,
            up: StoredPart::new(up, quantize)?,
            down: StoredPart::new(down, quantize)?,
        })
    }

    pub(super) fn matrices(&self) -> Result<ExpertMatrices<'_>> {
        let gate = self.gate.as_ref().map(StoredPart::matrix).transpose()?;
        Ok(ExpertMatrices {
            gate,
            up: self.up.matrix()?,
            down: self.down.matrix()?,
        })
    }
}
