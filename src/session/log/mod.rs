//! The durable log of sessions: what it says and in which order. Whoever owns the file implements [`LogStorage`].
//!
//! Every change of a session is written before it is made, so what the log says and what the store holds differ by at most the
//! evictions, which are written with the next change. The log is append-only; once most of it is out of date it is rewritten
//! beside itself, a chunk of sessions at a time, while changes go to both.
//!
//! Records carry marks, numbers and checksums of their own, so that one damaged record costs what it says and no more: reading
//! goes on at the next one, and a session of which something is missing is read-only where it was last whole.

mod append;
mod fault;
mod frame;
mod open;
mod record;
mod replay;
mod rewrite;
mod scan;
mod shared;
mod v1;
mod window;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::ops::Range;

use self::append::Chain;
use self::frame::Marker;
use self::rewrite::Rewrite;
use super::state::{Outcome, SessionKey};
use crate::request::SessionId;

pub use fault::LogFault;
pub use shared::{StoredRecord, stored_session};

/// Names the model, tokenizer and template that a log's tokens belong to.
pub type Fingerprint = [u8; 32];
/// Names a tenant for good, whatever its number is today; a digest of its API key, never the key.
pub type TenantName = [u8; 32];

/// The tenant of servers without keys.
pub const NO_TENANT: (u32, TenantName) = (0, [0; 32]);
/// Bytes of out-of-date records below which a log is not worth rewriting.
const MIN_GARBAGE: u64 = 1 << 20;
/// Bytes of a tenant's name that a record carries.
const TENANT_BYTES: usize = 16;

/// The beginning of a tenant's name.
type TenantTag = [u8; TENANT_BYTES];

fn tag(name: &TenantName) -> TenantTag {
    let mut tag = [0; TENANT_BYTES];
    tag.copy_from_slice(&name[..TENANT_BYTES]);
    tag
}

/// What a log and the server that writes it must agree about.
#[derive(Debug, Clone)]
pub struct LogOptions {
    /// Of the served model.
    pub fingerprint: Fingerprint,
    /// The served model's name, for messages.
    pub model: String,
    /// Each tenant's number and name.
    pub tenants: Vec<(u32, TenantName)>,
    /// Bytes of out-of-date records below which the log is not rewritten.
    pub min_garbage: u64,
    /// What begins each record of a log that is begun here. Nobody may guess it, lest tokens be taken for a record.
    pub marker: Marker,
}

impl LogOptions {
    /// Options of a server without keys, and a marker that nobody knows.
    pub fn new(fingerprint: Fingerprint, model: impl Into<String>) -> Self {
        Self {
            fingerprint,
            model: model.into(),
            tenants: vec![NO_TENANT],
            min_garbage: MIN_GARBAGE,
            marker: RandomState::new().hash_one(fingerprint).to_le_bytes(),
        }
    }
}

/// The file under a log, and the one that a rewrite puts in its place. Errors are those of the file.
#[allow(clippy::missing_errors_doc)]
pub trait LogStorage {
    /// The log from its beginning.
    fn reader(&mut self) -> io::Result<Box<dyn Read + '_>>;
    /// Appends to the log; it is safe from the death of the process once this returns. Fails where the log is not in its place
    /// any more: what is written there would be gone with the process.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Truncates the log after its first `len` bytes.
    fn truncate(&mut self, len: u64) -> io::Result<()>;
    /// Makes what was appended safe from the death of the machine.
    fn sync(&mut self) -> io::Result<()>;
    /// Copies parts of the log to a file of their own, which is safe when this returns, and names it.
    fn keep(&mut self, parts: &[Range<u64>]) -> io::Result<String>;
    /// Begins a new file, empty, beside the log; one that was begun before is thrown away. The log's place is made again where
    /// it is gone.
    fn begin_rewrite(&mut self) -> io::Result<()>;
    /// Appends to the new file.
    fn append_rewrite(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes the new file safe and puts it in the log's place, at once or not at all.
    fn finish_rewrite(&mut self) -> io::Result<()>;
    /// Makes the new file's place safe from the death of the machine.
    fn sync_place(&mut self) -> io::Result<()>;
    /// Leaves word beside the log, for whoever opens it next, that nobody knows what of it is on the disk; or takes it back.
    fn mark_suspect(&mut self, suspect: bool) -> io::Result<()>;
    /// Whether there is such word.
    fn is_marked_suspect(&mut self) -> io::Result<bool>;
}

/// What damaged records took from a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// Its tenant's number; absent where the server knows no such tenant.
    pub tenant: Option<u32>,
    /// The session.
    pub id: SessionId,
    /// Turns that it still has, and is read-only at; 0: it is gone.
    pub kept_turns: usize,
    /// The last of the turns that are lost; where it is not above `kept_turns`, a rewind or the session's end is.
    pub last_turn: usize,
}

/// What was found in a log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Restored {
    /// The format's version.
    pub version: u8,
    /// Live sessions.
    pub sessions: usize,
    /// Their turns.
    pub turns: usize,
    /// Tokens of their turns.
    pub tokens: usize,
    /// Bytes of whole records.
    pub bytes: u64,
    /// Bytes of a record at the end that was written in part, which is cut off.
    pub torn: u64,
    /// Bytes of records that are damaged.
    pub damaged: u64,
    /// What the damaged records took.
    pub losses: Vec<Loss>,
    /// Number of missing records of unknown sessions.
    pub unnamed: u64,
    /// The file in which the bytes of torn and damaged records are kept.
    pub kept: Option<String>,
    /// Whose tokens these are, and the model's name; absent where the log has no header yet.
    pub model: Option<(Fingerprint, String)>,
}

impl Restored {
    /// Whether all that was written is there.
    pub fn is_whole(&self) -> bool {
        self.damaged == 0 && self.losses.is_empty() && self.unnamed == 0
    }
}

/// One change of a session, or its eviction.
#[derive(Debug)]
pub enum Change<'a> {
    /// A transaction's outcome.
    Settle(&'a SessionKey, &'a Outcome),
    /// The store let an idle session go.
    Evict(&'a SessionKey),
}

/// An open log.
#[derive(Debug)]
pub struct SessionLog<S> {
    storage: S,
    options: LogOptions,
    tags: HashMap<u32, TenantTag>,
    marker: Marker,
    chain: Chain,
    len: u64,
    synced: u64,
    rewrite: Option<Rewrite>,
    /// Why the last write failed.
    fault: Option<LogFault>,
    /// What is on the disk is not known: nothing is appended until the log is written anew.
    suspect: bool,
}

impl<S: LogStorage> SessionLog<S> {
    /// Bytes of the log.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether the log holds nothing, not even a header: never.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file, to look at.
    pub const fn storage(&self) -> &S {
        &self.storage
    }

    /// The file, so that it can be closed.
    pub fn into_storage(self) -> S {
        self.storage
    }

    /// Why nothing can be written now; absent where the last write went well.
    pub const fn fault(&self) -> Option<&LogFault> {
        self.fault.as_ref()
    }

    /// Whether the log must be written anew before anything is appended to it.
    pub const fn is_suspect(&self) -> bool {
        self.suspect
    }
}
