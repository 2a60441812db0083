//! The stream of one reply as a Python class.

use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::engine;
use crate::wire::Poll;

/// One request's finished wire bytes. Dropping it before the end aborts the request.
#[pyclass(frozen, module = "lmserve._core")]
pub struct Stream {
    pub(super) inner: engine::Stream,
}

#[pymethods]
impl Stream {
    /// The stream's id, as `Engine.drain` names it.
    #[getter]
    fn id(&self) -> u64 {
        self.inner.id()
    }

    /// (0 waiting | 1 accepted | 2 ended, bytes since the last call). Raises `LmserveError` where the request was refused, or
    /// failed before its first byte.
    fn poll<'py>(&self, py: Python<'py>) -> PyResult<(u8, Bound<'py, PyBytes>)> {
        match self.inner.poll() {
            Poll::Waiting => Ok((0, PyBytes::new(py, b""))),
            Poll::Accepted(bytes) => Ok((1, PyBytes::new(py, &bytes))),
            Poll::Ended(bytes) => Ok((2, PyBytes::new(py, &bytes))),
            Poll::Failed(error) => Err(error.into()),
        }
    }

    /// (prompt tokens, of these cached, completion tokens, seconds to its first step, seconds to its first token) so far.
    fn record(&self) -> (usize, usize, usize, Option<f64>, Option<f64>) {
        let record = self.inner.record();
        let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
        (
            record.prompt_tokens,
            record.cached_tokens,
            record.completion_tokens,
            seconds(record.queued),
            seconds(record.first_token),
        )
    }

    /// The reader left. May be called again.
    fn abort(&self) {
        self.inner.abort();
    }
}
