//! The session log as a Python class: opened before a model is loaded, for it may be refused.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use serde_json::json;

use crate::engine::{DurableSessions, Fsync, OpenLog, check_log, repair_log};
use crate::error::{Error, Result};
use crate::session::{LogOptions, Restored, StoreLimits};

/// An open log with its sessions, until an engine takes them.
#[pyclass(frozen, module = "lmserve._core")]
pub(super) struct OpenSessionLog {
    log: Mutex<Option<OpenLog>>,
    restored: Restored,
}

#[pymethods]
impl OpenSessionLog {
    #[new]
    #[pyo3(signature = (settings, *, max_sessions = 100_000, session_ttl = 0.0))]
    fn new(settings: &Bound<'_, PyAny>, max_sessions: usize, session_ttl: f64) -> PyResult<Self> {
        let limits = store_limits(max_sessions, session_ttl)?;
        let durable = durable_sessions(settings)?;
        let log = settings.py().detach(|| durable.open(limits))?;
        Ok(Self {
            restored: log.restored().clone(),
            log: Mutex::new(Some(log)),
        })
    }

    /// What the log brought back, as JSON of `lmserve.engine.sessions.LogReport`.
    #[getter]
    fn restored(&self) -> Vec<u8> {
        report(&self.restored)
    }
}

/// What a session log has and what it has lost, as JSON of `lmserve.engine.sessions.LogReport`; nothing is changed.
#[pyfunction]
pub(super) fn check_session_log(py: Python<'_>, folder: PathBuf) -> PyResult<Vec<u8>> {
    Ok(report(&py.detach(move || check_log(&folder))?))
}

/// Keeps what is damaged in a session log beside it, and writes it anew where something is missing. Returns what was found, as
/// `check_session_log`.
#[pyfunction]
pub(super) fn repair_session_log(py: Python<'_>, folder: PathBuf) -> PyResult<Vec<u8>> {
    Ok(report(&py.detach(|| repair_log(folder))?))
}

fn report(restored: &Restored) -> Vec<u8> {
    let losses = restored.losses.iter().map(|loss| {
        json!({
            "tenant": loss.tenant,
            "id": loss.id,
            "kept_turns": loss.kept_turns,
            "last_turn": loss.last_turn,
        })
    });
    let report = json!({
        "version": restored.version,
        "model": restored.model.as_ref().map(|(_, name)| name),
        "sessions": restored.sessions,
        "turns": restored.turns,
        "tokens": restored.tokens,
        "bytes": restored.bytes,
        "torn": restored.torn,
        "damaged": restored.damaged,
        "losses": losses.collect::<Vec<_>>(),
        "unnamed": restored.unnamed,
        "kept": restored.kept,
    });
    report.to_string().into_bytes()
}

impl OpenSessionLog {
    /// Gives the log to an engine.
    ///
    /// # Errors
    /// `invalid_value` the second time.
    pub(super) fn take(&self) -> Result<OpenLog> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.take()
            .ok_or_else(|| Error::invalid("session_log", "another engine has this log already"))
    }
}

/// What is kept of sessions.
///
/// # Errors
/// `invalid_value` for a time that is none.
pub(super) fn store_limits(max_sessions: usize, session_ttl: f64) -> Result<StoreLimits> {
    if !session_ttl.is_finite() || session_ttl < 0.0 {
        let message =
            format!("session_ttl must be a number of seconds >= 0, but {session_ttl} was given");
        return Err(Error::invalid("session_ttl", message));
    }
    Ok(StoreLimits {
        max_sessions,
        ttl_ms: (session_ttl * 1000.0) as u64,
    })
}

/// What `lmserve.engine.sessions.SessionLog` says.
fn durable_sessions(log: &Bound<'_, PyAny>) -> PyResult<DurableSessions> {
    let fsync: String = log.getattr("fsync")?.extract()?;
    let fsync = match fsync.as_str() {
        "always" => Fsync::Always,
        "interval" => Fsync::Interval,
        "never" => Fsync::Never,
        _ => {
            let message = format!("fsync must be always, interval or never, but {fsync} was given");
            return Err(Error::invalid("fsync", message).into());
        }
    };
    let fingerprint = log.getattr("fingerprint")?.extract()?;
    let model: String = log.getattr("model")?.extract()?;
    let tenants: HashMap<u32, [u8; 32]> = log.getattr("tenants")?.extract()?;
    let mut options = LogOptions::new(fingerprint, model);
    options.tenants = tenants.into_iter().collect();
    Ok(DurableSessions {
        folder: log.getattr("folder")?.extract()?,
        fsync,
        options,
    })
}
