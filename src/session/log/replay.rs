//! Reads a log back: every record up to the first one that is not whole.

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::crc::crc32;
use super::record::{FRAME_BYTES, MAGIC, MAX_RECORD_BYTES, Put, Record};
use super::{Fingerprint, TenantName};
use crate::session::state::{SessionState, Turn};

/// A session while its log is read.
#[derive(Debug, Default)]
struct Growing {
    tokens: Vec<u32>,
    turns: Vec<Turn>,
    seed: u64,
    system_tokens: usize,
    created_ms: u64,
    used_ms: u64,
}

/// What a log holds. Tenants and sessions are named as the log names them.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// Absent where the log ends before its header does.
    pub(super) header: Option<(Fingerprint, String)>,
    pub(super) tenants: Vec<TenantName>,
    sessions: BTreeMap<(u32, i64), Growing>,
    /// Evicted sessions, and how many records came before each one's eviction.
    expired: BTreeMap<(u32, i64), u64>,
    records: u64,
    /// Bytes of the magic and of whole records.
    pub(super) good: u64,
    /// Bytes behind them.
    pub(super) torn: u64,
}

/// Why no more records are read.
enum Stop {
    End,
    /// What follows is no whole record, and so many bytes of it were read.
    Torn(u64),
}

/// Reads up to `limit` bytes, fewer at the end.
fn read_up_to(reader: &mut impl Read, limit: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    reader.take(limit as u64).read_to_end(buffer)?;
    Ok(())
}

impl Replay {
    /// Reads everything.
    ///
    /// # Errors
    /// Those of `reader`; `InvalidData` where this is not the beginning of a log.
    pub(super) fn read(reader: &mut impl Read) -> io::Result<Self> {
        let mut replay = Self::default();
        let mut buffer = Vec::new();
        read_up_to(reader, MAGIC.len(), &mut buffer)?;
        if !MAGIC.starts_with(&buffer) {
            let message = "it does not begin as a session log does";
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        if buffer.len() < MAGIC.len() {
            replay.torn = buffer.len() as u64;
            return Ok(replay);
        }
        replay.good = MAGIC.len() as u64;
        let read = loop {
            match replay.read_record(reader, &mut buffer)? {
                None => {}
                Some(Stop::End) => return Ok(replay),
                Some(Stop::Torn(read)) => break read,
            }
        };
        replay.torn = read + io::copy(reader, &mut io::sink())?;
        Ok(replay)
    }

    fn read_record(
        &mut self,
        reader: &mut impl Read,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Option<Stop>> {
        read_up_to(reader, FRAME_BYTES, buffer)?;
        if buffer.is_empty() {
            return Ok(Some(Stop::End));
        }
        let read = buffer.len();
        let Some((length, rest)) = buffer.split_first_chunk::<4>() else {
            return Ok(Some(Stop::Torn(read as u64)));
        };
        let Ok(checksum) = <[u8; 4]>::try_from(rest) else {
            return Ok(Some(Stop::Torn(read as u64)));
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_RECORD_BYTES {
            return Ok(Some(Stop::Torn(read as u64)));
        }
        read_up_to(reader, length, buffer)?;
        let whole = buffer.len() == length && crc32(buffer) == u32::from_le_bytes(checksum);
        let taken = whole && Record::parse(buffer).is_some_and(|record| self.take(record));
        let read = (FRAME_BYTES + buffer.len()) as u64;
        if !taken {
            return Ok(Some(Stop::Torn(read)));
        }
        self.good += read;
        Ok(None)
    }

    /// Applies one record; false where it cannot follow those before it.
    fn take(&mut self, record: Record) -> bool {
        self.records += 1;
        let known = |tenant: u32| (tenant as usize) < self.tenants.len();
        match record {
            Record::Header { fingerprint, model } => {
                let first = self.header.is_none();
                self.header.get_or_insert((fingerprint, model));
                first
            }
            _ if self.header.is_none() => false,
            Record::Tenant(name) => {
                let new = !self.tenants.contains(&name);
                self.tenants.push(name);
                new
            }
            Record::Put { tenant, id, put } if known(tenant) => self.put((tenant, id), &put),
            Record::Drop {
                tenant,
                id,
                expired,
            } if known(tenant) => {
                self.sessions.remove(&(tenant, id));
                self.expired.remove(&(tenant, id));
                if expired {
                    self.expired.insert((tenant, id), self.records);
                }
                true
            }
            Record::Put { .. } | Record::Drop { .. } => false,
        }
    }

    fn put(&mut self, key: (u32, i64), put: &Put) -> bool {
        let before = self.sessions.get(&key);
        let (tokens, turns) = before.map_or((0, &[][..]), |s| (s.tokens.len(), &s.turns));
        if !put.fits(tokens, turns) {
            return false;
        }
        self.expired.remove(&key);
        let session = self.sessions.entry(key).or_default();
        put.apply(&mut session.tokens, &mut session.turns);
        session.seed = put.seed;
        session.system_tokens = put.system_tokens as usize;
        session.created_ms = put.created_ms;
        session.used_ms = put.used_ms;
        true
    }

    /// The sessions, and the evicted ones in order of their eviction.
    #[allow(clippy::type_complexity)]
    pub(super) fn take_sessions(&mut self) -> (Vec<((u32, i64), SessionState)>, Vec<(u32, i64)>) {
        let sessions = std::mem::take(&mut self.sessions).into_iter();
        let states = sessions.map(|(key, session)| (key, session.into_state()));
        let mut expired: Vec<_> = std::mem::take(&mut self.expired).into_iter().collect();
        expired.sort_unstable_by_key(|&(_, order)| order);
        let expired = expired.into_iter().map(|(key, _)| key).collect();
        (states.collect(), expired)
    }
}

impl Growing {
    fn into_state(self) -> SessionState {
        SessionState {
            tokens: self.tokens.into(),
            turns: self.turns.into(),
            seed: self.seed,
            system_tokens: self.system_tokens,
            created_ms: self.created_ms,
            used_ms: self.used_ms,
        }
    }
}
