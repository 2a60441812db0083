//! The first version of the format, which had neither marks nor numbers: it is read once, and written anew as it is now.

use std::io::{self, Read};

use crc32fast::{Hasher, hash};

use super::record::{Bytes, Put};
use super::replay::{Header, Name, Replay};
use super::window::Window;
use super::{Fingerprint, TenantName, TenantTag, tag};
use crate::session::ledger::SessionUsage;
use crate::session::state::Gone;

/// First bytes of a log of the first version.
pub(super) const MAGIC: &[u8; 8] = b"lmsess1\n";

const FRAME_BYTES: usize = 8;
const MAX_RECORD_BYTES: usize = 1 << 28;
const TENANT_RECORD: usize = 33;
const DROP_RECORD: usize = 14;
const PUT_RECORD: usize = 53;
/// Kind, tenant and id, which name what a record is about.
const NAME_BYTES: usize = 13;
/// Longest damaged record that is named.
const NAMED_WITHIN: usize = 1 << 20;

enum Record {
    Header(Fingerprint, String),
    Tenant(TenantName),
    Put(u32, i64, Put),
    Drop(u32, i64, Gone),
}

impl Record {
    fn parse(payload: &[u8]) -> Option<Self> {
        let mut rest = Bytes(payload);
        let [kind] = rest.array()?;
        let record = match kind {
            b'H' => {
                let fingerprint = rest.array()?;
                let model = String::from_utf8(rest.take_all().to_vec()).ok()?;
                Self::Header(fingerprint, model)
            }
            b'T' => Self::Tenant(rest.array()?),
            b'P' => {
                let tenant = rest.u32()?;
                let id = i64::from_le_bytes(rest.array()?);
                Self::Put(tenant, id, parse_put(&mut rest)?)
            }
            b'D' => {
                let tenant = rest.u32()?;
                let id = i64::from_le_bytes(rest.array()?);
                let gone = if rest.flag()? {
                    Gone::Evicted
                } else {
                    Gone::Ended
                };
                Self::Drop(tenant, id, gone)
            }
            _ => return None,
        };
        rest.0.is_empty().then_some(record)
    }
}

fn parse_put(rest: &mut Bytes<'_>) -> Option<Put> {
    let [seed, created_ms, used_ms] = [rest.u64()?, rest.u64()?, rest.u64()?];
    let [system_tokens, keep_turns, keep_tokens] = [rest.u32()?, rest.u32()?, rest.u32()?];
    let turns = rest.u32()? as usize;
    let turns = rest.turns(turns)?;
    let count = rest.0.len() / 4;
    Some(Put {
        seed,
        created_ms,
        used_ms,
        used_order: 0,
        lost_turn: 0,
        system_tokens,
        keep_turns,
        keep_tokens,
        turns,
        logprobs: Vec::new(),
        keys: Vec::new(),
        tokens: rest.tokens(count)?,
        usage: SessionUsage::default(),
        adapter: None,
    })
}

/// The whole payload at the beginning of `bytes`, and the bytes of its record.
fn payload(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let mut rest = Bytes(bytes);
    let length = rest.u32()? as usize;
    let crc = rest.u32()?;
    let payload = rest.slice(length)?;
    (hash(payload) == crc).then_some((payload, FRAME_BYTES + length))
}

/// Bytes that a record would take that began here, if one may.
fn length_of(bytes: &[u8]) -> Option<usize> {
    let mut rest = Bytes(bytes);
    let length = rest.u32()? as usize;
    rest.u32()?;
    let [kind] = rest.array()?;
    let may_be = match kind {
        b'H' => length > TENANT_RECORD,
        b'T' => length == TENANT_RECORD,
        b'D' => length == DROP_RECORD,
        b'P' => length >= PUT_RECORD,
        _ => false,
    };
    (may_be && length <= MAX_RECORD_BYTES).then_some(FRAME_BYTES + length)
}

struct Scan<R> {
    window: Window<R>,
    replay: Replay,
    tenants: Vec<TenantTag>,
    /// Tenants from this number on are not certain: the record of one of them may be among the damaged ones.
    uncertain_from: usize,
}

/// Reads a log.
///
/// # Errors
/// Those of the reader; `InvalidData` where its header is damaged.
pub(super) fn read(mut window: Window<impl Read>) -> io::Result<Replay> {
    window.skip(MAGIC.len());
    let mut scan = Scan {
        window,
        replay: Replay::default(),
        tenants: Vec::new(),
        uncertain_from: usize::MAX,
    };
    scan.replay.good = MAGIC.len() as u64;
    let begin = scan.window.peek(FRAME_BYTES)?;
    let length = Bytes(begin).u32().map_or(0, |length| length as usize);
    let bytes = scan
        .window
        .peek(FRAME_BYTES + length.min(MAX_RECORD_BYTES))?;
    let head = payload(bytes).map(|(payload, len)| (Record::parse(payload), len));
    let Some((Some(Record::Header(fingerprint, model)), len)) = head else {
        // Where the header was never written whole, nothing came behind it.
        let len = bytes.len();
        if length <= 4096 && len < FRAME_BYTES + length {
            scan.replay.end = (MAGIC.len() + len) as u64;
            scan.replay.torn = 0..scan.replay.end;
            return Ok(scan.replay);
        }
        let message = "its header is damaged";
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    };
    scan.replay.header = Some(Header {
        fingerprint,
        model,
        marker: None,
    });
    scan.window.skip(len);
    scan.replay.good += len as u64;
    while !scan.window.peek(1)?.is_empty() {
        if !scan.take()? {
            scan.pass_over()?;
        }
    }
    scan.replay.end = scan.window.offset();
    Ok(scan.replay)
}

impl<R: Read> Scan<R> {
    /// Takes the record that is next, if it is whole.
    fn take(&mut self) -> io::Result<bool> {
        let Some(len) = length_of(self.window.peek(FRAME_BYTES + 1)?) else {
            return Ok(false);
        };
        let whole = payload(self.window.peek(len)?);
        let Some(record) = whole.and_then(|(payload, _)| Record::parse(payload)) else {
            return Ok(false);
        };
        self.window.skip(len);
        self.replay.good += len as u64;
        self.apply(record);
        Ok(true)
    }

    fn apply(&mut self, record: Record) {
        match record {
            Record::Header(..) => {}
            Record::Tenant(name) => self.tenants.push(tag(&name)),
            Record::Put(tenant, id, put) => match self.name(tenant, id) {
                // What follows a lost change may fit what was before it, and be wrong.
                Some(name) => {
                    let follows = put.is_whole() || !self.replay.has_lost(&name);
                    self.replay.put(name, &put, follows, 0);
                }
                None => self.replay.lose_numbers(1),
            },
            Record::Drop(tenant, id, gone) => match self.name(tenant, id) {
                Some(name) => self.replay.drop(name, gone),
                None => self.replay.lose_numbers(1),
            },
        }
    }

    fn name(&self, tenant: u32, id: i64) -> Option<Name> {
        let tenant = tenant as usize;
        let tag = self.tenants.get(tenant)?;
        (tenant < self.uncertain_from).then_some((*tag, id.into()))
    }

    /// Goes on at the next whole record.
    fn pass_over(&mut self) -> io::Result<()> {
        let begin = self.window.offset();
        let ahead = self.window.peek(NAMED_WITHIN)?;
        if let Some(name) = mended_tenant(ahead) {
            // Without its name nothing of the tenant could be read.
            self.tenants.push(tag(&name));
            self.window.skip(FRAME_BYTES + TENANT_RECORD);
            self.replay.damaged.push(begin..self.window.offset());
            return Ok(());
        }
        let copy = ahead[..ahead.len().min(NAMED_WITHIN)].to_vec();
        let end = match self.claimed_end()? {
            Some(len) => len,
            None => self.search()?,
        };
        self.window.skip(end);
        let len = (self.window.offset() - begin) as usize;
        let lost = copy.get(..len).and_then(mended);
        if lost.is_none() {
            self.uncertain_from = self.uncertain_from.min(self.tenants.len());
            if self.window.peek(1)?.is_empty() {
                self.replay.torn = begin..self.window.offset();
                return Ok(());
            }
        }
        self.replay.damaged.push(begin..self.window.offset());
        self.replay.lose_numbers(1);
        if let Some(lost) = lost
            && let Some(name) = self.name(lost.tenant, lost.id)
        {
            self.replay.lose_named(name, lost.turns);
        }
        Ok(())
    }

    /// Bytes of the damaged record that is next, where its length leads to another record or to the end.
    fn claimed_end(&mut self) -> io::Result<Option<usize>> {
        let Some(len) = length_of(self.window.peek(FRAME_BYTES + 1)?) else {
            return Ok(None);
        };
        let bytes = self.window.peek(len + FRAME_BYTES + 1)?;
        if bytes.len() == len {
            return Ok(Some(len));
        }
        let Some(next) = bytes.get(len..).and_then(length_of) else {
            return Ok(None);
        };
        let whole = payload(&self.window.peek(len + next)?[len..]).is_some();
        Ok(whole.then_some(len))
    }

    /// Looks for a whole record behind the next byte, and stands before it; else at the end. Returns 0.
    fn search(&mut self) -> io::Result<usize> {
        loop {
            self.window.skip(1);
            let bytes = self.window.peek(FRAME_BYTES + 1)?;
            if bytes.is_empty() {
                return Ok(0);
            }
            let Some(len) = length_of(bytes) else {
                continue;
            };
            let whole = payload(self.window.peek(len)?);
            if whole.is_some_and(|(payload, _)| Record::parse(payload).is_some()) {
                return Ok(0);
            }
        }
    }
}

/// Whose a damaged record was, and how many turns the session had behind it; 0: that is damaged, too.
struct Lost {
    tenant: u32,
    id: i64,
    turns: u32,
}

/// Flips each of the bits in turn until `right` finds something.
fn flip_back<T>(bytes: &mut [u8], right: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
    (0..bytes.len() * 8).find_map(|bit| {
        bytes[bit / 8] ^= 1 << (bit % 8);
        let found = right(bytes);
        if found.is_none() {
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        found
    })
}

/// The tenant's name that stood here before one bit was flipped.
fn mended_tenant(bytes: &[u8]) -> Option<TenantName> {
    let mut record = bytes.get(..FRAME_BYTES + TENANT_RECORD)?.to_vec();
    flip_back(&mut record, |record| {
        match Record::parse(payload(record)?.0)? {
            Record::Tenant(name) => Some(name),
            _ => None,
        }
    })
}

/// What a damaged record was about: with the bit flipped back that was flipped, if it is one of those that say so.
fn mended(record: &[u8]) -> Option<Lost> {
    let (frame, payload) = record.split_first_chunk::<FRAME_BYTES>()?;
    let crc = u32::from_le_bytes(*frame.last_chunk()?);
    let (name, said) = payload.split_at_checked(NAME_BYTES)?;
    let mut rest = Hasher::new();
    rest.update(said);
    let mut name = name.to_vec();
    // Where that helps nothing, the name is as it was.
    let _ = flip_back(&mut name, |name| {
        let mut hasher = Hasher::new();
        hasher.update(name);
        hasher.combine(&rest);
        (hasher.finalize() == crc).then_some(())
    });
    let turns = match Record::parse(&[&name, said].concat()) {
        Some(Record::Put(_, _, put)) => put.turns_after(),
        _ => 0,
    };
    let mut rest = Bytes(&name);
    let [kind] = rest.array()?;
    let long_enough = match kind {
        b'P' => payload.len() >= PUT_RECORD,
        b'D' => payload.len() == DROP_RECORD,
        _ => false,
    };
    let lost = Lost {
        tenant: rest.u32()?,
        id: i64::from_le_bytes(rest.array()?),
        turns,
    };
    long_enough.then_some(lost)
}
