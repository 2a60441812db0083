//! Checks or repairs a session log that no server has open.

use std::path::{Path, PathBuf};

use super::log_file::{LOG, LogFile};
use super::log_writer::{DurableSessions, Fsync};
use crate::error::{Error, Kind, Result};
use crate::session::{LogOptions, Restored, SessionLog, StoreLimits};

/// Limits that let every session live.
const ALL: StoreLimits = StoreLimits {
    max_sessions: usize::MAX,
    ttl_ms: 0,
};

fn open(folder: &Path) -> Result<LogFile> {
    if !folder.join(LOG).exists() {
        let message = format!("there is no {LOG} in {}", folder.display());
        return Err(Error::new(Kind::NotFound, "session_log_not_found", message));
    }
    LogFile::open(folder)
}

/// Reports what the log in a folder has and what it has lost. Changes nothing.
///
/// # Errors
/// `session_log_not_found` (404); those of [`LogFile::open`] and [`SessionLog::check`].
pub fn check_log(folder: &Path) -> Result<Restored> {
    SessionLog::check(&mut open(folder)?)
}

/// Repairs a log as a server does at its start: copies damaged parts to a file beside it, cuts off a torn end, and rewrites the log
/// if something is missing.
///
/// # Errors
/// As [`check_log`], and those of [`SessionLog::open`].
pub fn repair_log(folder: PathBuf) -> Result<Restored> {
    let found = check_log(&folder)?;
    let Some((fingerprint, model)) = found.model else {
        return Ok(found);
    };
    let mut options = LogOptions::new(fingerprint, model);
    options.tenants.clear();
    let durable = DurableSessions {
        folder,
        fsync: Fsync::Always,
        options,
    };
    Ok(durable.open(ALL)?.into_restored())
}
