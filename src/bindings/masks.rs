//! The masks of a step as a Python object.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyList};

use crate::guided;
use crate::sched::Step;

/// The masks of the rows of one step whose tokens follow a grammar, as they are computed.
#[pyclass(frozen, module = "lmserve._core")]
pub struct StepMasks(pub(super) Arc<guided::StepMasks>);

impl StepMasks {
    /// None if no row of the step follows a grammar.
    pub(super) fn of(step: &Step) -> Option<Self> {
        step.masks.as_ref().map(|masks| Self(Arc::clone(masks)))
    }
}

#[pymethods]
impl StepMasks {
    /// The step's sampled rows that have masks, ascending.
    #[getter]
    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, self.0.rows())
    }

    /// Waits until the masks are there: row after row, the allowed tokens as bits, 32 in a native word.
    fn wait<'py>(&self, py: Python<'py>) -> Bound<'py, PyByteArray> {
        py.detach(|| self.0.wait());
        PyByteArray::new(py, &self.0.to_bytes())
    }
}
