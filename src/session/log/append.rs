//! Writes changes to a log: all of them or none.

use std::collections::HashMap;
use std::io;

use super::fault::LogFault;
use super::frame::{DROP, HEADER, Head, MAGIC, Marker, PADDING, PUT};
use super::record::Put;
use super::{Change, LogStorage, SessionLog, TENANT_BYTES, TenantTag};
use crate::error::{Error, Result};
use crate::session::state::{Gone, SessionKey, SessionState};

/// Bytes that a disk must take before it counts as having room again.
const PROBE_BYTES: usize = 64 << 10;

/// The numbers of a file's records.
#[derive(Debug, Clone, Default)]
pub(super) struct Chain {
    /// Of the last one.
    pub(super) seq: u64,
    /// Of each session's last one.
    pub(super) last: HashMap<SessionKey, u64>,
}

/// Records that are not written yet.
pub(super) struct Staged<'a> {
    chain: &'a Chain,
    tags: &'a HashMap<u32, TenantTag>,
    marker: Marker,
    seq: u64,
    /// The sessions' last records among these; None: the session is gone.
    last: HashMap<SessionKey, Option<u64>>,
    pub(super) bytes: Vec<u8>,
}

impl<'a> Staged<'a> {
    pub(super) fn new(chain: &'a Chain, tags: &'a HashMap<u32, TenantTag>, marker: Marker) -> Self {
        Self {
            chain,
            tags,
            marker,
            seq: chain.seq,
            last: HashMap::new(),
            bytes: Vec::new(),
        }
    }

    /// The bytes, and what becomes of the chain once they are written.
    pub(super) fn finish(self) -> (Vec<u8>, Links) {
        let links = Links {
            seq: self.seq,
            last: self.last,
        };
        (self.bytes, links)
    }

    fn last(&self, key: &SessionKey) -> Option<u64> {
        let staged = self.last.get(key).copied();
        staged.unwrap_or_else(|| self.chain.last.get(key).copied())
    }

    fn record(
        &mut self,
        key: &SessionKey,
        kind: u8,
        prev: u64,
        turns: u32,
        body: &[u8],
    ) -> Result<()> {
        let Some(&tenant) = self.tags.get(&key.tenant) else {
            return Err(Error::internal(format!(
                "tenant {} has no name in the session log",
                key.tenant
            )));
        };
        self.seq += 1;
        let head = Head {
            seq: self.seq,
            prev,
            kind,
            tenant,
            id: key.id.to_log(),
            turns,
            body_bytes: body.len() as u32,
        };
        head.write(self.marker, body, &mut self.bytes);
        self.last
            .insert(key.clone(), (kind == PUT).then_some(self.seq));
        Ok(())
    }

    pub(super) fn change(&mut self, change: &Change<'_>) -> Result<()> {
        match *change {
            Change::Settle(key, outcome) => match &outcome.after {
                Some(after) => self.put(key, outcome.before.as_ref(), after),
                None => self.gone(key, Gone::Ended),
            },
            Change::Evict(key) => self.gone(key, Gone::Evicted),
        }
    }

    pub(super) fn gone(&mut self, key: &SessionKey, gone: Gone) -> Result<()> {
        self.record(key, DROP, 0, 0, &[gone.byte()])
    }

    pub(super) fn put(
        &mut self,
        key: &SessionKey,
        before: Option<&SessionState>,
        after: &SessionState,
    ) -> Result<()> {
        let last = self.last(key);
        // A difference needs a record that it can follow.
        let put = Put::between(before.filter(|_| last.is_some()), after);
        let prev = last.filter(|_| !put.is_whole()).unwrap_or(0);
        let mut body = Vec::new();
        put.write(&mut body);
        self.record(key, PUT, prev, put.turns_after(), &body)
    }
}

/// What records that were written do to a chain.
pub(super) struct Links {
    seq: u64,
    last: HashMap<SessionKey, Option<u64>>,
}

impl Chain {
    pub(super) fn take(&mut self, links: Links) {
        self.seq = links.seq;
        for (key, last) in links.last {
            match last {
                Some(seq) => self.last.insert(key, seq),
                None => self.last.remove(&key),
            };
        }
    }
}

impl<S: LogStorage> SessionLog<S> {
    /// The first bytes of a log: its header, written twice, because nothing can be read without it.
    pub(super) fn head(&self) -> Vec<u8> {
        let mut body = self.options.fingerprint.to_vec();
        body.extend_from_slice(self.options.model.as_bytes());
        let mut bytes = MAGIC.to_vec();
        for _ in 0..2 {
            plain(HEADER, 0, body.len()).write(self.marker, &body, &mut bytes);
        }
        bytes
    }

    /// Writes changes, all of them or none; `synced`: and makes them safe from the death of the machine.
    ///
    /// # Errors
    /// 507 `storage_full` or 503 `storage_failed` where the file takes nothing; the changes must not be made then.
    pub fn append(&mut self, changes: &[Change<'_>], synced: bool) -> Result<()> {
        if self.suspect {
            return Err(self.refusal());
        }
        let mut staged = Staged::new(&self.chain, &self.tags, self.marker);
        for change in changes {
            staged.change(change)?;
        }
        let (bytes, links) = staged.finish();
        self.begin_write();
        if let Err(e) = self.storage.append(&bytes) {
            self.write_failed(&e);
            return Err(self.refusal());
        }
        if synced && let Err(e) = self.storage.sync() {
            // The next fsync would tell of success, and know nothing of these pages.
            drop(self.storage.truncate(self.len));
            self.suspend(LogFault::of(&e));
            return Err(self.refusal());
        }
        self.suspect = false;
        self.chain.take(links);
        self.len += bytes.len() as u64;
        if synced {
            self.synced = self.len;
        }
        self.fault = None;
        if self.mirror(changes).is_err() {
            // The log itself is whole: the next rewrite begins anew.
            self.rewrite = None;
        }
        Ok(())
    }

    /// Until a write has ended, it is unknown what is on the disk. A panic during the write leaves the log in this state.
    pub(super) fn begin_write(&mut self) {
        self.suspect = true;
        self.fault = Some(LogFault::interrupted());
    }

    /// Half a record may be there, and the next one must not come after it.
    fn write_failed(&mut self, error: &io::Error) {
        let fault = LogFault::of(error);
        let cut = self.storage.truncate(self.len);
        if fault.full && cut.is_ok() {
            self.suspect = false;
            self.fault = Some(fault);
        } else {
            self.suspend(fault);
        }
    }

    pub(super) fn suspend(&mut self, fault: LogFault) {
        // A server that dies before the log is written anew leaves pages behind that no later fsync writes.
        drop(self.storage.mark_suspect(true));
        self.fault = Some(fault);
        self.suspect = true;
        self.rewrite = None;
    }

    fn refusal(&self) -> Error {
        let unknown = || Error::internal("the state of the session log is unknown");
        self.fault.as_ref().map_or_else(unknown, LogFault::error)
    }

    /// Brings the changes of sessions that were copied already to the new file.
    fn mirror(&mut self, changes: &[Change<'_>]) -> io::Result<()> {
        let Some(rewrite) = &mut self.rewrite else {
            return Ok(());
        };
        let mut staged = Staged::new(&rewrite.chain, &self.tags, self.marker);
        for change in changes {
            let (Change::Settle(key, _) | Change::Evict(key)) = change;
            if rewrite.last.as_ref().is_some_and(|last| *key <= last) {
                staged.change(change).map_err(io::Error::other)?;
            }
        }
        let (bytes, links) = staged.finish();
        self.storage.append_rewrite(&bytes)?;
        rewrite.chain.take(links);
        rewrite.len += bytes.len() as u64;
        Ok(())
    }

    /// Makes all that was appended safe from the death of the machine.
    ///
    /// # Errors
    /// 503 `storage_failed` where the system refuses. It may have forgotten what it could not write: the log must be written
    /// anew then, and takes nothing before.
    pub fn sync(&mut self) -> Result<()> {
        if self.suspect {
            return Err(self.refusal());
        }
        if self.synced < self.len {
            if let Err(e) = self.storage.sync() {
                self.suspend(LogFault::of(&e));
                return Err(self.refusal());
            }
            self.synced = self.len;
        }
        Ok(())
    }

    /// Whether something was appended that the death of the machine could take.
    pub const fn is_unsynced(&self) -> bool {
        self.synced < self.len
    }

    /// Tries whether a disk that was full has room again.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn probe(&mut self) -> Result<()> {
        let mut bytes = Vec::new();
        let body = vec![0; PROBE_BYTES];
        plain(PADDING, self.chain.seq + 1, body.len()).write(self.marker, &body, &mut bytes);
        self.begin_write();
        let tried = self
            .storage
            .append(&bytes)
            .and_then(|()| self.storage.sync());
        if let Err(e) = tried {
            self.write_failed(&e);
            return Err(self.refusal());
        }
        if let Err(e) = self.storage.truncate(self.len) {
            self.suspend(LogFault::of(&e));
            return Err(self.refusal());
        }
        (self.suspect, self.fault) = (false, None);
        Ok(())
    }
}

/// The head of a record that is about no session.
fn plain(kind: u8, seq: u64, body: usize) -> Head {
    Head {
        seq,
        prev: 0,
        kind,
        tenant: [0; TENANT_BYTES],
        id: String::new(),
        turns: 0,
        body_bytes: body as u32,
    }
}
