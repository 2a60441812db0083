//! The records of a session log as docs/sessions.md describes them, read without the code that writes them.

use std::ops::Range;

use crate::request::SessionId;
use crate::session::SessionKey;

const MAGIC_BYTES: usize = 8;
/// Bytes before a session's id: marker, number, the number it follows, kind, the id's length, and the tenant.
const BEFORE_ID: usize = 8 + 8 + 8 + 1 + 2 + 16;
/// Bytes behind the id: turns, the body's length, and a checksum; and the checksum behind the body.
const BEHIND_ID: usize = 4 + 4 + 4;
const CHECKSUM: usize = 4;

/// A record about a session.
#[derive(Debug)]
pub(super) struct Frame {
    /// Its place in the file.
    pub(super) bytes: Range<usize>,
    pub(super) key: SessionKey,
    /// It says all of the session, and needs no record before it.
    pub(super) whole: bool,
    /// Turns of the session behind it.
    pub(super) turns: u32,
}

fn number<const N: usize>(log: &[u8], at: usize) -> Option<[u8; N]> {
    log.get(at..)?.first_chunk().copied()
}

/// The record at `at` and its end; without a frame where it is about no session.
fn next(log: &[u8], at: usize) -> Option<(Option<Frame>, usize)> {
    let id_bytes = u16::from_le_bytes(number(log, at + 25)?) as usize;
    let id_at = at + BEFORE_ID;
    let behind = id_at + id_bytes;
    let turns = u32::from_le_bytes(number(log, behind)?);
    let body = u32::from_le_bytes(number(log, behind + 4)?) as usize;
    let end = behind + BEHIND_ID + body + CHECKSUM;
    if end > log.len() {
        return None;
    }
    let id = std::str::from_utf8(&log[id_at..behind]).ok()?;
    if !matches!(log[at + 24], b'P' | b'D') {
        return Some((None, end));
    }
    let id = match id.strip_prefix('"') {
        Some(name) => SessionId::Name(name.into()),
        None => SessionId::Number(id.parse().ok()?),
    };
    // The name of a tenant of the simulator is its number, in each byte.
    let tenant = u32::from(log[at + 27]);
    let frame = Some(Frame {
        bytes: at..end,
        key: SessionKey::new(tenant, id),
        whole: number(log, at + 16) == Some([0; 8]),
        turns,
    });
    Some((frame, end))
}

/// The records about sessions in a log that is not damaged, in order, and where the last whole record of any kind ends.
pub(super) fn frames(log: &[u8]) -> (Vec<Frame>, usize) {
    let (mut frames, mut at) = (Vec::new(), MAGIC_BYTES);
    while let Some((frame, end)) = next(log, at) {
        frames.extend(frame);
        at = end;
    }
    (frames, at)
}
