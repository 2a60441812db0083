//! The simulator, for `lmserve simulate`.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::Result;
use crate::sim;

/// Runs the simulator and returns its counters and the digest of what its clients read.
#[pyfunction]
#[pyo3(signature = (seed, steps))]
pub fn simulate(py: Python<'_>, seed: u64, steps: u64) -> PyResult<Bound<'_, PyDict>> {
    let report: Result<sim::Report> = py.detach(|| sim::simulate(seed, steps));
    let report = report?;
    let dict = PyDict::new(py);
    dict.set_item("worlds", report.worlds)?;
    for (name, count) in report.counters.entries() {
        dict.set_item(name, count)?;
    }
    dict.set_item("digest", report.digest)?;
    Ok(dict)
}
