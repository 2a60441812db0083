//! A session store in Python as the engine's [`SharedStore`].

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use crate::engine::{SharedStore, Written};
use crate::session::{SessionKey, StoredRecord};

/// Drives an object with the methods of `CoreStore` in `lmserve/engine/session_store.py`, on a thread of the core.
pub(super) struct PyStore(Py<PyAny>);

impl PyStore {
    pub(super) const fn new(store: Py<PyAny>) -> Self {
        Self(store)
    }

    fn try_write(
        &self,
        py: Python<'_>,
        changes: &[(&SessionKey, Option<StoredRecord>)],
    ) -> PyResult<Vec<Written>> {
        let given = PyList::empty(py);
        for (key, record) in changes {
            let record = record.as_ref().map(|record| {
                let bytes = PyBytes::new(py, &record.bytes);
                let usage = record.usage;
                let used = (
                    usage.prompt_tokens,
                    usage.cached_tokens,
                    usage.computed_tokens(),
                    usage.generated_tokens,
                    usage.time_ms,
                );
                (record.whole, record.turns, record.tokens, used, bytes)
            });
            given.append((key.tenant, &key.id, record))?;
        }
        let told = self.0.bind(py).call_method1("write", (given,))?;
        let told: Vec<(String, String)> = told.extract()?;
        let written = told.into_iter().map(|(what, why)| match what.as_str() {
            "kept" => Written::Kept,
            "whole" => Written::Whole,
            "overtaken" => Written::Overtaken,
            _ => Written::Failed(why),
        });
        Ok(written.collect())
    }
}

impl SharedStore for PyStore {
    fn write(&mut self, changes: &[(&SessionKey, Option<StoredRecord>)]) -> Vec<Written> {
        Python::attach(|py| {
            self.try_write(py, changes).unwrap_or_else(|error| {
                changes
                    .iter()
                    .map(|_| Written::Failed(error.to_string()))
                    .collect()
            })
        })
    }

    fn probe(&mut self) -> Result<(), String> {
        Python::attach(|py| {
            let told = self.0.bind(py).call_method0("probe");
            let why = told.and_then(|told| told.extract::<Option<String>>());
            match why {
                Ok(None) => Ok(()),
                Ok(Some(why)) => Err(why),
                Err(error) => Err(error.to_string()),
            }
        })
    }
}
