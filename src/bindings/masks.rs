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
    /// Masks that were computed elsewhere: those of `rows`, ascending, as `wait` gives them. Raises `ValueError` if they do
    /// not divide evenly among the rows.
    #[new]
    fn new(rows: Vec<usize>, masks: &[u8]) -> PyResult<Self> {
        let words = masks.as_chunks().0;
        if rows.is_empty()
            || !masks.len().is_multiple_of(rows.len() * size_of::<u32>())
            || masks.is_empty()
        {
            let message = format!(
                "masks of {} rows were given in {} bytes",
                rows.len(),
                masks.len()
            );
            return Err(pyo3::exceptions::PyValueError::new_err(message));
        }
        let each = words.len() / rows.len();
        let given = rows
            .into_iter()
            .zip(words.chunks(each))
            .map(|(row, words)| {
                let words = words.iter().map(|&word| u32::from_ne_bytes(word)).collect();
                guided::MaskRow::given(row, words)
            });
        Ok(Self(Arc::new(guided::StepMasks::new(
            given.collect(),
            Arc::default(),
        ))))
    }

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
