//! Why a log cannot be written.

use std::io;

use crate::error::{Error, Kind};

const LOG: &str = "the session log";
const STORE: &str = "the session store";

/// Why nothing can be written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFault {
    /// It is full; else it failed.
    pub full: bool,
    /// The system's words.
    pub why: String,
    /// What takes nothing.
    pub place: &'static str,
}

impl LogFault {
    pub(super) fn of(error: &io::Error) -> Self {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        Self {
            full: matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge),
            why: error.to_string(),
            place: LOG,
        }
    }

    pub(super) fn interrupted() -> Self {
        Self {
            full: false,
            why: "a write to it did not finish".to_owned(),
            place: LOG,
        }
    }

    pub(super) fn left_behind() -> Self {
        Self {
            full: false,
            why: "an earlier server could not determine what is on the disk".to_owned(),
            place: LOG,
        }
    }

    /// Of a store that several servers share.
    pub fn of_store(why: impl Into<String>) -> Self {
        Self {
            full: false,
            why: why.into(),
            place: STORE,
        }
    }

    /// `storage_full` or `storage_failed`.
    pub const fn code(&self) -> &'static str {
        if self.full {
            "storage_full"
        } else {
            "storage_failed"
        }
    }

    /// One sentence for the operator.
    pub fn message(&self) -> String {
        let what = if self.full {
            "has no room on its disk"
        } else {
            "cannot be written"
        };
        format!("{} {what}: {}", self.place, self.why)
    }

    /// 507 `storage_full` or 503 `storage_failed`.
    pub fn error(&self) -> Error {
        let kind = if self.full {
            Kind::StorageFull
        } else {
            Kind::Unavailable
        };
        let message = format!("{}; the session is unchanged", self.message());
        Error::new(kind, self.code(), message).with_detail("retry_after", 5)
    }
}
