//! Reads a log from its beginning to its end, and continues after damaged records.

use std::io::{self, Read};

use super::frame::{DROP, HEADER, Head, MAGIC, MAX_HEAD_BYTES, Marker, PUT};
use super::record::parse_header;
use super::replay::{Header, Replay, Said};
use super::v1;
use super::window::Window;
use crate::request::SessionId;

/// How far into a log its header is looked for.
const HEADER_WITHIN: usize = 64 << 10;
/// Longest file that may be the torn beginning of a log.
const UNBEGUN: usize = 1024;

/// Reads everything.
///
/// # Errors
/// Those of `reader`; `InvalidData` where this is no log, or has lost its header.
pub(super) fn read(reader: impl Read) -> io::Result<Replay> {
    let mut window = Window::new(reader);
    let begin = window.peek(HEADER_WITHIN)?;
    if begin.starts_with(v1::MAGIC) {
        return v1::read(window);
    }
    let begin = &begin[..begin.len().min(HEADER_WITHIN)];
    let begun =
        MAGIC.starts_with(&begin[..begin.len().min(MAGIC.len())]) || v1::MAGIC.starts_with(begin);
    let mut replay = Replay::default();
    let Some((header, marker)) = find_header(begin) else {
        if !begun {
            return Err(invalid("it does not begin like a session log"));
        }
        // If the header was never written completely, nothing comes after it.
        let len = begin.len();
        if len > UNBEGUN {
            return Err(invalid("its header is damaged"));
        }
        replay.torn = 0..len as u64;
        replay.end = len as u64;
        return Ok(replay);
    };
    replay.header = Some(header);
    let mut scan = Scan {
        window,
        marker,
        replay,
    };
    if scan.window.peek(MAGIC.len())?.starts_with(MAGIC) {
        scan.window.skip(MAGIC.len());
        scan.replay.good = MAGIC.len() as u64;
    }
    scan.run()?;
    scan.replay.end = scan.window.offset();
    Ok(scan.replay)
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// The first of the copies of the header that is whole.
fn find_header(begin: &[u8]) -> Option<(Header, Marker)> {
    (0..begin.len()).find_map(|at| {
        let marker = *begin[at..].first_chunk()?;
        let head = Head::parse(&begin[at..], marker).filter(|head| head.kind == HEADER)?;
        let (fingerprint, model) = parse_header(head.body(&begin[at..])?)?;
        let header = Header {
            fingerprint,
            model,
            marker: Some(marker),
        };
        Some((header, marker))
    })
}

struct Scan<R> {
    window: Window<R>,
    marker: Marker,
    replay: Replay,
}

/// A record at one place of the file.
enum Found {
    /// It is whole, and takes so many bytes.
    Whole(u64, Said, usize),
    /// It is damaged, or the file ends before it does; what it was about, as far as that can be known.
    Damaged(Option<Head>),
}

impl<R: Read> Scan<R> {
    fn run(&mut self) -> io::Result<()> {
        while !self.window.peek(1)?.is_empty() {
            match self.record()? {
                Found::Whole(seq, said, len) => self.take(seq, said, len),
                Found::Damaged(head) => self.pass_over(head)?,
            }
        }
        Ok(())
    }

    fn take(&mut self, seq: u64, said: Said, len: usize) {
        self.replay.take(seq, said);
        self.replay.good += len as u64;
        self.window.skip(len);
    }

    /// The record that is next.
    fn record(&mut self) -> io::Result<Found> {
        let bytes = self.window.peek(MAX_HEAD_BYTES)?;
        let Some(head) = Head::parse(bytes, self.marker) else {
            let head = Head::parse_with_one_bit_flipped(bytes, self.marker);
            return Ok(Found::Damaged(head));
        };
        let len = head.record_len();
        let body = head.body(self.window.peek(len)?);
        let said = body.and_then(|body| Said::parse(&head, body));
        // A record of the past, at a place of the present, was not written here.
        let is_new = head.kind == HEADER || head.seq > self.replay.seq;
        Ok(match said.filter(|_| is_new) {
            Some(said) => Found::Whole(head.seq, said, len),
            None => Found::Damaged(Some(head)),
        })
    }

    /// Goes on at the next whole record. `head`: of the damaged one that is here.
    fn pass_over(&mut self, head: Option<Head>) -> io::Result<()> {
        let begin = self.window.offset();
        let mut heads: Vec<(u64, Head)> = head.into_iter().map(|head| (begin, head)).collect();
        loop {
            self.window.skip(1);
            if !self.find_marker()? {
                break;
            }
            match self.record()? {
                Found::Whole(seq, said, len) => {
                    self.replay.damaged.push(begin..self.window.offset());
                    self.name(heads.iter().map(|(_, head)| head));
                    self.take(seq, said, len);
                    return Ok(());
                }
                Found::Damaged(head) => {
                    let at = self.window.offset();
                    heads.extend(head.map(|head| (at, head)));
                }
            }
        }
        let end = self.window.offset();
        // A record that the file has no room for was being written when the server died.
        heads.retain(|(at, head)| at + head.record_len() as u64 <= end);
        if heads.is_empty() {
            self.replay.torn = begin..end;
        } else {
            self.replay.damaged.push(begin..end);
            // The header has no number.
            let numbered = heads.iter().filter(|(_, head)| head.kind != HEADER);
            self.replay.lose_numbers(numbered.count() as u64);
            self.name(heads.iter().map(|(_, head)| head));
        }
        Ok(())
    }

    /// Skips to where the next record may begin; false at the end of the file.
    fn find_marker(&mut self) -> io::Result<bool> {
        loop {
            let bytes = self.window.peek(MAX_HEAD_BYTES)?;
            if bytes.is_empty() {
                return Ok(false);
            }
            let first = self.marker[0];
            let at = bytes.iter().position(|&byte| byte == first);
            let at = at.unwrap_or(bytes.len());
            let found = bytes[at..].starts_with(&self.marker);
            self.window.skip(at);
            if found {
                return Ok(true);
            }
            self.window.skip(1);
        }
    }

    fn name<'a>(&mut self, heads: impl Iterator<Item = &'a Head>) {
        let seq = self.replay.seq;
        for head in heads.filter(|head| head.seq > seq) {
            if let (Some(id), PUT | DROP) = (SessionId::from_log(&head.id), head.kind) {
                self.replay.lose_named((head.tenant, id), head.turns);
            }
        }
    }
}
