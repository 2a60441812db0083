//! A request's reply as its reader sees it.

use std::sync::{Arc, PoisonError};

use super::admission::{RequestRecord, SharedRecord};
use super::events::Abort;
use super::shared::Shared;
use crate::wire::{Mailbox, Poll};

/// One request's reply. Dropping it before the end aborts the request.
#[derive(Debug)]
pub struct Stream {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) shared: Arc<Shared>,
    pub(super) record: SharedRecord,
}

impl Stream {
    /// The stream's id, as [`Engine::drain`] names it.
    pub fn id(&self) -> u64 {
        self.mailbox.id()
    }

    /// Takes the bytes that came since the last call.
    pub fn poll(&self) -> Poll {
        self.mailbox.poll()
    }

    /// Token counts and times of the request so far.
    pub fn record(&self) -> RequestRecord {
        *self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Aborts the request, because the reader has left.
    pub fn abort(&self) {
        self.shared.abort(self.id(), Abort::Disconnect);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.abort();
    }
}
