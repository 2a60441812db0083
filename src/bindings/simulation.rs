//! The simulator, for `lmserve simulate`.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::{Error, Result};
use crate::sim;
use crate::sim::capacity::{Setup, TraceRequest};

/// Runs the simulator and returns its counters, its faults and the digest of what its clients read.
#[pyfunction]
#[pyo3(signature = (seed, steps))]
pub fn simulate(py: Python<'_>, seed: u64, steps: u64) -> PyResult<Bound<'_, PyDict>> {
    let report: Result<sim::Report> = py.detach(|| sim::simulate(seed, steps));
    let report = report?;
    let dict = PyDict::new(py);
    dict.set_item("worlds", report.worlds)?;
    for (name, entries) in [
        ("counters", report.counters.entries()),
        ("faults", report.faults.entries()),
    ] {
        let counts = PyDict::new(py);
        for (name, count) in entries {
            counts.set_item(name, count)?;
        }
        dict.set_item(name, counts)?;
    }
    dict.set_item("digest", report.digest)?;
    Ok(dict)
}

/// Puts a trace (JSON lines) on the servers of a setup (JSON) and returns what it comes to, as JSON.
#[pyfunction]
pub fn capacity<'py>(py: Python<'py>, trace: &[u8], setup: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    let outcome: Result<Vec<u8>> = py.detach(|| {
        let trace = TraceRequest::parse_lines(trace)?;
        let capacity = sim::capacity::capacity(&trace, &Setup::parse(setup)?)?;
        serde_json::to_vec(&capacity).map_err(|e| Error::internal(e.to_string()))
    });
    Ok(PyBytes::new(py, &outcome?))
}
