//! The frame of a record: where it begins, whom it is about and what it follows, checked apart from what it says. A record whose
//! body is damaged can so still be named, and reading goes on at the next frame.

use crc32fast::{Hasher, hash};

use super::record::Bytes;
use super::{TENANT_BYTES, TenantTag};

/// First bytes of a log; the digit is the format's version.
pub(super) const MAGIC: &[u8; 8] = b"lmsess2\n";
/// Bytes of a head without the session's id.
pub(super) const HEAD_BYTES: usize = 8 + 8 + 8 + 1 + 2 + TENANT_BYTES + 4 + 4 + 4;
/// Bytes of the longest head.
pub(super) const MAX_HEAD_BYTES: usize = HEAD_BYTES + MAX_ID_BYTES;
/// Longest id: 128 characters, and a sign that they are text.
const MAX_ID_BYTES: usize = 128 * 4 + 1;
/// Longest body: far more than a session of 16 million tokens takes.
pub(super) const MAX_BODY_BYTES: usize = 1 << 28;

const CRC_BYTES: usize = 4;
const ID_LENGTH_AT: usize = 25;

/// Random bytes that begin every record of one log. Nobody who cannot read the file can write tokens that look like a record.
pub(super) type Marker = [u8; 8];

/// Kinds of records.
pub(super) const HEADER: u8 = b'H';
pub(super) const PUT: u8 = b'P';
pub(super) const DROP: u8 = b'D';
pub(super) const PADDING: u8 = b'N';

/// The head of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    /// The record's number in its file, from 1; 0 for the file's header.
    pub(super) seq: u64,
    /// The number of the record that this one is a difference from; 0: it needs none.
    pub(super) prev: u64,
    pub(super) kind: u8,
    pub(super) tenant: TenantTag,
    /// The session's id as text; empty where the record is about none.
    pub(super) id: String,
    /// Turns of the session after the change.
    pub(super) turns: u32,
    pub(super) body_bytes: u32,
}

impl Head {
    /// Bytes of the head.
    pub(super) const fn head_len(&self) -> usize {
        HEAD_BYTES + self.id.len()
    }

    /// Bytes of the whole record.
    pub(super) const fn record_len(&self) -> usize {
        self.head_len() + self.body_bytes as usize + CRC_BYTES
    }

    /// Appends the record of this head and a body, whose length it takes.
    pub(super) fn write(&self, marker: Marker, body: &[u8], out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&marker);
        out.extend_from_slice(&self.seq.to_le_bytes());
        out.extend_from_slice(&self.prev.to_le_bytes());
        out.push(self.kind);
        out.extend_from_slice(&(self.id.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.tenant);
        out.extend_from_slice(self.id.as_bytes());
        out.extend_from_slice(&self.turns.to_le_bytes());
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        let head_crc = hash(&out[start..]);
        out.extend_from_slice(&head_crc.to_le_bytes());
        out.extend_from_slice(body);
        out.extend_from_slice(&body_crc(head_crc, body).to_le_bytes());
    }

    /// The head at the beginning of `bytes`, if there is one of this log whose checksum is right.
    pub(super) fn parse(bytes: &[u8], marker: Marker) -> Option<Self> {
        if !bytes.starts_with(&marker) {
            return None;
        }
        let id_length = u16::from_le_bytes(*bytes.get(ID_LENGTH_AT..)?.first_chunk()?);
        let length = HEAD_BYTES + usize::from(id_length);
        let (head, crc) = bytes.get(..length)?.split_last_chunk::<CRC_BYTES>()?;
        if hash(head) != u32::from_le_bytes(*crc) {
            return None;
        }
        let mut rest = Bytes(&head[marker.len()..]);
        let [seq, prev] = [rest.array()?, rest.array()?].map(u64::from_le_bytes);
        let [kind, _, _] = rest.array()?;
        let tenant = rest.array()?;
        let id = std::str::from_utf8(rest.slice(id_length.into())?).ok()?;
        let [turns, body_bytes] = [rest.array()?, rest.array()?].map(u32::from_le_bytes);
        (body_bytes as usize <= MAX_BODY_BYTES).then(|| Self {
            seq,
            prev,
            kind,
            tenant,
            id: id.to_owned(),
            turns,
            body_bytes,
        })
    }

    /// The head that stood here before one bit of it was flipped. Good enough to name a record, never to believe it.
    pub(super) fn parse_with_one_bit_flipped(bytes: &[u8], marker: Marker) -> Option<Self> {
        let mut bytes = bytes[..bytes.len().min(MAX_HEAD_BYTES)].to_vec();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let head = Self::parse(&bytes, marker);
            if head.is_some() {
                return head;
            }
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        None
    }

    /// The body of the record at the beginning of `bytes`, if it is whole.
    pub(super) fn body<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let record = bytes.get(..self.record_len())?;
        let (rest, crc) = record.split_last_chunk::<CRC_BYTES>()?;
        let (head, body) = rest.split_at(self.head_len());
        let head_crc = head.last_chunk::<CRC_BYTES>()?;
        let right = body_crc(u32::from_le_bytes(*head_crc), body) == u32::from_le_bytes(*crc);
        right.then_some(body)
    }
}

/// A body belongs to its head: it is right with no other one.
fn body_crc(head_crc: u32, body: &[u8]) -> u32 {
    let mut hasher = Hasher::new_with_initial(head_crc);
    hasher.update(body);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKER: Marker = *b"\x01markers";

    fn record() -> (Head, Vec<u8>) {
        let head = Head {
            seq: 7,
            prev: 3,
            kind: PUT,
            tenant: [9; TENANT_BYTES],
            id: "17".into(),
            turns: 4,
            body_bytes: 5,
        };
        let mut bytes = Vec::new();
        head.write(MARKER, b"hello", &mut bytes);
        (head, bytes)
    }

    #[test]
    fn a_record_comes_back() {
        let (head, bytes) = record();
        assert_eq!(bytes.len(), head.record_len());
        assert_eq!(Head::parse(&bytes, MARKER), Some(head.clone()));
        assert_eq!(head.body(&bytes), Some(&b"hello"[..]));
        assert_eq!(head.body(&bytes[..bytes.len() - 1]), None);
        assert_eq!(Head::parse(&bytes, *b"another_"), None);
    }

    #[test]
    fn a_flipped_bit_is_found_and_the_record_is_still_named() {
        let (head, bytes) = record();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            if bit / 8 < head.head_len() {
                assert_eq!(Head::parse(&damaged, MARKER), None);
                let named = Head::parse_with_one_bit_flipped(&damaged, MARKER);
                assert_eq!(named, Some(head.clone()), "bit {bit}");
            } else {
                assert_eq!(Head::parse(&damaged, MARKER), Some(head.clone()));
                assert_eq!(head.body(&damaged), None);
            }
        }
    }
}
