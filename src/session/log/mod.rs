//! The durable log of sessions: what it says and in which order. Whoever owns the file implements [`LogStorage`].
//!
//! Every change of a session is written before it is made, so what the log says and what the store holds differ by at most the
//! evictions, which are written with the next change. The log is append-only; once most of it is out of date it is rewritten
//! beside itself, a chunk of sessions at a time, while changes go to both.

mod crc;
mod record;
mod replay;

use std::collections::HashMap;
use std::io::{self, Read};

use self::record::{MAGIC, Put, Record};
use self::replay::Replay;
use super::state::{Outcome, SessionKey, SessionState};
use super::store::{SessionStore, StoreLimits};
use crate::error::{Error, Kind, Result};

/// Names the model, tokenizer and template that a log's tokens belong to.
pub type Fingerprint = [u8; 32];
/// Names a tenant for good, whatever its number is today; a digest of its API key, never the key.
pub type TenantName = [u8; 32];

/// The tenant of servers without keys.
pub const NO_TENANT: (u32, TenantName) = (0, [0; 32]);
/// Bytes of out-of-date records below which a log is not worth rewriting.
const MIN_GARBAGE: u64 = 1 << 20;
/// The numbers of tenants whose keys the server does not know (any more) go down from here.
const FIRST_STRANGER: u32 = u32::MAX;

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
}

impl LogOptions {
    /// Options of a server without keys.
    pub fn new(fingerprint: Fingerprint, model: impl Into<String>) -> Self {
        Self {
            fingerprint,
            model: model.into(),
            tenants: vec![NO_TENANT],
            min_garbage: MIN_GARBAGE,
        }
    }
}

/// The file under a log, and the one that a rewrite puts in its place. Errors are those of the file.
#[allow(clippy::missing_errors_doc)]
pub trait LogStorage {
    /// The log from its beginning.
    fn reader(&mut self) -> io::Result<Box<dyn Read + '_>>;
    /// Appends to the log; it is safe from the death of the process once this returns.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Cuts the log off behind its first `len` bytes.
    fn truncate(&mut self, len: u64) -> io::Result<()>;
    /// Makes what was appended safe from the death of the machine.
    fn sync(&mut self) -> io::Result<()>;
    /// Begins a new file, empty, beside the log; one that was begun before is thrown away.
    fn begin_rewrite(&mut self) -> io::Result<()>;
    /// Appends to the new file.
    fn append_rewrite(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes the new file safe and puts it in the log's place, at once or not at all.
    fn finish_rewrite(&mut self) -> io::Result<()>;
}

/// What was found in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Restored {
    /// Live sessions.
    pub sessions: usize,
    /// Tokens of their turns.
    pub tokens: usize,
    /// Bytes of whole records.
    pub bytes: u64,
    /// Bytes behind the last whole record, which were cut off.
    pub torn: u64,
}

/// One change of a session, or its eviction.
#[derive(Debug)]
pub enum Change<'a> {
    /// A transaction's outcome.
    Settle(SessionKey, &'a Outcome),
    /// The store let an idle session go.
    Evict(SessionKey),
}

/// The numbers that one file gives to tenants.
#[derive(Debug, Clone, Default)]
struct Numbering(HashMap<u32, u32>);

/// A rewrite that is under way.
#[derive(Debug)]
struct Rewrite {
    numbering: Numbering,
    /// The last session that was copied.
    last: Option<SessionKey>,
    len: u64,
}

/// An open log.
#[derive(Debug)]
pub struct SessionLog<S> {
    storage: S,
    options: LogOptions,
    names: HashMap<u32, TenantName>,
    numbering: Numbering,
    len: u64,
    synced: u64,
    rewrite: Option<Rewrite>,
    /// Why nothing can be written any more.
    broken: Option<String>,
}

fn unwritable(why: impl std::fmt::Display) -> Error {
    Error::internal(format!(
        "the session log cannot be written: {why}; the session is as it was before"
    ))
}

impl<S: LogStorage> SessionLog<S> {
    /// Opens a log, or begins one, and fills a store with its sessions.
    ///
    /// # Errors
    /// `session_log_mismatch` (400) for a log of another model; `invalid_session_log` (400) for what is no log, or has lost its
    /// header; `session_log_unreadable` (500) where the file cannot be read or cut.
    pub fn open(
        mut storage: S,
        options: LogOptions,
        limits: StoreLimits,
        now_ms: u64,
    ) -> Result<(Self, SessionStore, Restored)> {
        let read = storage
            .reader()
            .and_then(|mut reader| Replay::read(&mut reader));
        let mut replay = read.map_err(|e| match e.kind() {
            io::ErrorKind::InvalidData => invalid(&e),
            _ => unreadable(&e),
        })?;
        let mut log = Self {
            storage,
            names: options.tenants.iter().copied().collect(),
            options,
            numbering: Numbering::default(),
            len: replay.good,
            synced: 0,
            rewrite: None,
            broken: None,
        };
        let head = log.head();
        check_header(&replay, &log.options, head.len() as u64)?;
        if replay.torn > 0 {
            let kept = if replay.header.is_some() {
                replay.good
            } else {
                0
            };
            log.storage.truncate(kept).map_err(|e| unreadable(&e))?;
        }
        if replay.header.is_none() {
            log.storage.truncate(0).map_err(|e| unreadable(&e))?;
            log.storage.append(&head).map_err(|e| unreadable(&e))?;
            log.len = head.len() as u64;
        }
        log.storage.sync().map_err(|e| unreadable(&e))?;
        log.synced = log.len;
        let store = log.fill(&mut replay, limits, now_ms);
        let restored = Restored {
            sessions: store.len(),
            tokens: store.tokens(),
            bytes: replay.good,
            torn: replay.torn,
        };
        Ok((log, store, restored))
    }

    fn fill(&mut self, replay: &mut Replay, limits: StoreLimits, now_ms: u64) -> SessionStore {
        let mut numbers = Vec::new();
        let mut stranger = FIRST_STRANGER;
        for name in &replay.tenants {
            let known = self.names.iter().find(|(_, known)| *known == name);
            let number = known.map_or(stranger, |(&number, _)| number);
            if known.is_none() {
                self.names.insert(number, *name);
                stranger -= 1;
            }
            self.numbering.0.insert(number, numbers.len() as u32);
            numbers.push(number);
        }
        let key = |(tenant, id): (u32, i64)| SessionKey {
            tenant: numbers[tenant as usize],
            id,
        };
        let mut store = SessionStore::new(limits);
        store.note_evictions();
        let (sessions, expired) = replay.take_sessions();
        for gone in expired {
            store.restore_evicted(key(gone));
        }
        for (at, state) in sessions {
            store.restore(key(at), state);
        }
        store.enforce(now_ms);
        store
    }

    fn head(&self) -> Vec<u8> {
        let mut head = MAGIC.to_vec();
        let header = Record::Header {
            fingerprint: self.options.fingerprint,
            model: self.options.model.clone(),
        };
        header.write(&mut head);
        head
    }

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

    /// The file, for whoever closes the log.
    pub fn into_storage(self) -> S {
        self.storage
    }

    /// Writes changes, all of them or none; `synced`: and makes them safe from the death of the machine.
    ///
    /// # Errors
    /// `internal_error` where the file takes nothing; the changes must not be made then.
    pub fn append(&mut self, changes: &[Change<'_>], synced: bool) -> Result<()> {
        if let Some(why) = &self.broken {
            return Err(unwritable(why));
        }
        let (mut bytes, mut numbering) = (Vec::new(), self.numbering.clone());
        for change in changes {
            numbering.encode(&self.names, change, &mut bytes)?;
        }
        let wrote = self
            .storage
            .append(&bytes)
            .and_then(|()| if synced { self.storage.sync() } else { Ok(()) });
        if let Err(e) = wrote {
            // Half a record may be there, and the next one must not come behind it.
            if let Err(e) = self.storage.truncate(self.len) {
                self.broken = Some(format!("{e}, nor cut back to its last whole record"));
            }
            return Err(unwritable(e));
        }
        self.numbering = numbering;
        self.len += bytes.len() as u64;
        if synced {
            self.synced = self.len;
        }
        if self.mirror(changes).is_err() {
            // The log itself is whole: the next rewrite begins anew.
            self.rewrite = None;
        }
        Ok(())
    }

    /// Brings the changes of sessions that were copied already to the new file.
    fn mirror(&mut self, changes: &[Change<'_>]) -> io::Result<()> {
        let Some(rewrite) = &mut self.rewrite else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        for change in changes {
            let (Change::Settle(key, _) | Change::Evict(key)) = change;
            if rewrite.last.is_some_and(|last| *key <= last) {
                let encoded = rewrite.numbering.encode(&self.names, change, &mut bytes);
                encoded.map_err(io::Error::other)?;
            }
        }
        rewrite.len += bytes.len() as u64;
        self.storage.append_rewrite(&bytes)
    }

    /// Makes all that was appended safe from the death of the machine.
    ///
    /// # Errors
    /// `internal_error` where the system refuses.
    pub fn sync(&mut self) -> Result<()> {
        if self.synced < self.len {
            self.storage.sync().map_err(unwritable)?;
            self.synced = self.len;
        }
        Ok(())
    }

    /// Whether something was appended that the death of the machine could take.
    pub const fn is_unsynced(&self) -> bool {
        self.synced < self.len
    }

    /// Whether most of the log is out of date, where `live` bytes would do.
    pub fn wants_rewrite(&self, live: u64) -> bool {
        let garbage = self.len.saturating_sub(live);
        self.rewrite.is_none() && garbage > live && garbage > self.options.min_garbage
    }

    /// Whether a rewrite is under way.
    pub const fn is_rewriting(&self) -> bool {
        self.rewrite.is_some()
    }

    /// Begins a rewrite.
    ///
    /// # Errors
    /// Those of the file. The log is as it was.
    pub fn begin_rewrite(&mut self) -> io::Result<()> {
        let head = self.head();
        self.storage.begin_rewrite()?;
        self.storage.append_rewrite(&head)?;
        self.rewrite = Some(Rewrite {
            numbering: Numbering::default(),
            last: None,
            len: head.len() as u64,
        });
        Ok(())
    }

    /// Copies the next sessions to the new file, which replaces the log behind the last of them. `next` gives some of the
    /// store's sessions in order, those behind a key, and `evicted` the remembered evictions.
    ///
    /// # Errors
    /// Those of the file. The rewrite is given up then, and the log is as it was.
    pub fn rewrite_some(
        &mut self,
        next: impl FnOnce(Option<SessionKey>) -> Vec<(SessionKey, SessionState)>,
        evicted: impl FnOnce() -> Vec<SessionKey>,
    ) -> io::Result<()> {
        let Some(mut rewrite) = self.rewrite.take() else {
            return Ok(());
        };
        let sessions = next(rewrite.last);
        let mut bytes = Vec::new();
        for (key, state) in &sessions {
            let encoded = rewrite
                .numbering
                .put(&self.names, *key, None, state, &mut bytes);
            encoded.map_err(io::Error::other)?;
        }
        let last = sessions.last().map(|(key, _)| *key);
        if last.is_none() {
            for key in evicted() {
                let change = Change::Evict(key);
                let encoded = rewrite.numbering.encode(&self.names, &change, &mut bytes);
                encoded.map_err(io::Error::other)?;
            }
        }
        self.storage.append_rewrite(&bytes)?;
        rewrite.len += bytes.len() as u64;
        if last.is_some() {
            rewrite.last = last;
            self.rewrite = Some(rewrite);
            return Ok(());
        }
        self.storage.finish_rewrite()?;
        self.numbering = rewrite.numbering;
        self.len = rewrite.len;
        self.synced = rewrite.len;
        Ok(())
    }
}

impl Numbering {
    /// The file's number of a tenant; its name is written before the first use.
    fn of(
        &mut self,
        names: &HashMap<u32, TenantName>,
        tenant: u32,
        out: &mut Vec<u8>,
    ) -> Result<u32> {
        if let Some(&number) = self.0.get(&tenant) {
            return Ok(number);
        }
        let Some(name) = names.get(&tenant) else {
            return Err(unwritable(format!("tenant {tenant} has no name")));
        };
        let number = self.0.len() as u32;
        Record::Tenant(*name).write(out);
        self.0.insert(tenant, number);
        Ok(number)
    }

    fn encode(
        &mut self,
        names: &HashMap<u32, TenantName>,
        change: &Change<'_>,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let (key, expired) = match *change {
            Change::Settle(key, outcome) => match &outcome.after {
                Some(after) => return self.put(names, key, outcome.before.as_ref(), after, out),
                None => (key, false),
            },
            Change::Evict(key) => (key, true),
        };
        let record = Record::Drop {
            tenant: self.of(names, key.tenant, out)?,
            id: key.id,
            expired,
        };
        record.write(out);
        Ok(())
    }

    fn put(
        &mut self,
        names: &HashMap<u32, TenantName>,
        key: SessionKey,
        before: Option<&SessionState>,
        after: &SessionState,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let record = Record::Put {
            tenant: self.of(names, key.tenant, out)?,
            id: key.id,
            put: Put::between(before, after),
        };
        record.write(out);
        Ok(())
    }
}

fn check_header(replay: &Replay, options: &LogOptions, head: u64) -> Result<()> {
    let Some((fingerprint, model)) = &replay.header else {
        // Where the head was never written whole, nothing came behind it.
        return if replay.good + replay.torn > head {
            Err(invalid(&"its header is damaged"))
        } else {
            Ok(())
        };
    };
    if *fingerprint == options.fingerprint {
        return Ok(());
    }
    let message = format!(
        "the session log belongs to another model, tokenizer or chat template: it was written with {model} ({}), and {} ({}) is \
         served; give another --session-dir, or move the log away",
        short(fingerprint),
        options.model,
        short(&options.fingerprint)
    );
    Err(Error::new(Kind::Invalid, "session_log_mismatch", message))
}

fn short(fingerprint: &Fingerprint) -> String {
    let [a, b, c, d, ..] = *fingerprint;
    format!("{:08x}", u32::from_be_bytes([a, b, c, d]))
}

fn invalid(why: &dyn std::fmt::Display) -> Error {
    let message = format!("the session log cannot be used: {why}; give another --session-dir");
    Error::new(Kind::Invalid, "invalid_session_log", message)
}

fn unreadable(why: &dyn std::fmt::Display) -> Error {
    let message = format!("the session log cannot be read: {why}");
    Error::new(Kind::Internal, "session_log_unreadable", message)
}
