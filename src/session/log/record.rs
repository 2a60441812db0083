//! The records of a session log as bytes: little-endian, and behind each one's length its checksum.

use super::crc::crc32;
use super::{Fingerprint, TenantName};
use crate::session::state::{SessionState, Turn};
use crate::text::Tail;

/// First bytes of a log; the digit is the format's version.
pub(super) const MAGIC: &[u8; 8] = b"lmsess1\n";
/// Length and checksum before each record.
pub(super) const FRAME_BYTES: usize = 8;
/// Longest record: far more than a session of 16 million tokens takes.
pub(super) const MAX_RECORD_BYTES: usize = 1 << 28;

const HEADER: u8 = b'H';
const TENANT: u8 = b'T';
const PUT: u8 = b'P';
const DROP: u8 = b'D';

/// What one record says. Tenants have numbers of the log's own, in order of their first record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    /// What the log's tokens mean.
    Header {
        fingerprint: Fingerprint,
        model: String,
    },
    /// The next tenant number is this tenant's.
    Tenant(TenantName),
    /// What a session has become.
    Put { tenant: u32, id: i64, put: Put },
    /// A session is gone.
    Drop { tenant: u32, id: i64, expired: bool },
}

/// A session's state as its difference from the one before: leading tokens and turns that stay, and what comes behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Put {
    pub(super) seed: u64,
    pub(super) created_ms: u64,
    pub(super) used_ms: u64,
    pub(super) system_tokens: u32,
    pub(super) keep_turns: u32,
    pub(super) keep_tokens: u32,
    /// Input tokens, output tokens and what each turn leaves open.
    pub(super) turns: Vec<(u32, u32, Tail)>,
    pub(super) tokens: Vec<u32>,
}

fn common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Put {
    /// The difference between two states of a session; `before` is absent where there was none.
    pub(super) fn between(before: Option<&SessionState>, after: &SessionState) -> Self {
        let keep_turns = before.map_or(0, |before| common(&before.turns, &after.turns));
        let keep_tokens = before.map_or(0, |before| common(&before.tokens, &after.tokens));
        let turns = after.turns[keep_turns..].iter();
        Self {
            seed: after.seed,
            created_ms: after.created_ms,
            used_ms: after.used_ms,
            system_tokens: after.system_tokens as u32,
            keep_turns: keep_turns as u32,
            keep_tokens: keep_tokens as u32,
            turns: turns
                .map(|t| (t.input_tokens as u32, t.output_tokens as u32, t.tail))
                .collect(),
            tokens: after.tokens[keep_tokens..].to_vec(),
        }
    }

    /// Whether the difference can follow a state of so many tokens and these turns.
    pub(super) fn fits(&self, tokens: usize, turns: &[Turn]) -> bool {
        let (keep_turns, keep_tokens) = (self.keep_turns as usize, self.keep_tokens as usize);
        if keep_turns > turns.len() || keep_tokens > tokens {
            return false;
        }
        let kept = turns[..keep_turns].last().map_or(0, Turn::end);
        let added = self
            .turns
            .iter()
            .map(|&(input, output, _)| input as usize + output as usize);
        let total = keep_tokens + self.tokens.len();
        keep_turns + self.turns.len() > 0
            && kept + added.sum::<usize>() == total
            && self.system_tokens as usize <= total
    }

    /// Applies the difference to a session that it fits.
    pub(super) fn apply(&self, tokens: &mut Vec<u32>, turns: &mut Vec<Turn>) {
        turns.truncate(self.keep_turns as usize);
        tokens.truncate(self.keep_tokens as usize);
        tokens.extend_from_slice(&self.tokens);
        for &(input, output, tail) in &self.turns {
            turns.push(Turn {
                start: turns.last().map_or(0, Turn::end),
                input_tokens: input as usize,
                output_tokens: output as usize,
                tail,
            });
        }
    }
}

impl Record {
    /// Appends the record with its length and checksum.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let frame = out.len();
        out.extend_from_slice(&[0; FRAME_BYTES]);
        match self {
            Self::Header { fingerprint, model } => {
                out.push(HEADER);
                out.extend_from_slice(fingerprint);
                out.extend_from_slice(model.as_bytes());
            }
            Self::Tenant(name) => {
                out.push(TENANT);
                out.extend_from_slice(name);
            }
            Self::Put { tenant, id, put } => {
                out.push(PUT);
                out.extend_from_slice(&tenant.to_le_bytes());
                out.extend_from_slice(&id.to_le_bytes());
                for number in [put.seed, put.created_ms, put.used_ms] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                let counts = [
                    put.system_tokens,
                    put.keep_turns,
                    put.keep_tokens,
                    put.turns.len() as u32,
                ];
                for count in counts {
                    out.extend_from_slice(&count.to_le_bytes());
                }
                for &(input, output, tail) in &put.turns {
                    out.extend_from_slice(&input.to_le_bytes());
                    out.extend_from_slice(&output.to_le_bytes());
                    out.push(u8::from(tail == Tail::OpenAssistant));
                }
                for token in &put.tokens {
                    out.extend_from_slice(&token.to_le_bytes());
                }
            }
            Self::Drop {
                tenant,
                id,
                expired,
            } => {
                out.push(DROP);
                out.extend_from_slice(&tenant.to_le_bytes());
                out.extend_from_slice(&id.to_le_bytes());
                out.push(u8::from(*expired));
            }
        }
        let payload = frame + FRAME_BYTES;
        let length = (out.len() - payload) as u32;
        let checksum = crc32(&out[payload..]);
        out[frame..frame + 4].copy_from_slice(&length.to_le_bytes());
        out[frame + 4..payload].copy_from_slice(&checksum.to_le_bytes());
    }

    /// The record of a payload whose checksum is right; None where it is none of this format.
    pub(super) fn parse(payload: &[u8]) -> Option<Self> {
        let mut rest = Bytes(payload);
        let record = match rest.array::<1>()?[0] {
            HEADER => Self::Header {
                fingerprint: rest.array()?,
                model: String::from_utf8(rest.take_all().to_vec()).ok()?,
            },
            TENANT => Self::Tenant(rest.array()?),
            PUT => Self::Put {
                tenant: rest.u32()?,
                id: i64::from_le_bytes(rest.array()?),
                put: parse_put(&mut rest)?,
            },
            DROP => Self::Drop {
                tenant: rest.u32()?,
                id: i64::from_le_bytes(rest.array()?),
                expired: rest.flag()?,
            },
            _ => return None,
        };
        rest.0.is_empty().then_some(record)
    }
}

fn parse_put(rest: &mut Bytes<'_>) -> Option<Put> {
    let [seed, created_ms, used_ms] = [rest.u64()?, rest.u64()?, rest.u64()?];
    let [system_tokens, keep_turns, keep_tokens] = [rest.u32()?, rest.u32()?, rest.u32()?];
    let count = rest.u32()? as usize;
    // No allocation that the bytes do not pay for.
    let mut turns = Vec::with_capacity(count.min(rest.0.len() / 9));
    for _ in 0..count {
        let (input, output) = (rest.u32()?, rest.u32()?);
        let tail = if rest.flag()? {
            Tail::OpenAssistant
        } else {
            Tail::Closed
        };
        turns.push((input, output, tail));
    }
    let (tokens, odd) = rest.take_all().as_chunks::<4>();
    odd.is_empty().then(|| Put {
        seed,
        created_ms,
        used_ms,
        system_tokens,
        keep_turns,
        keep_tokens,
        turns,
        tokens: tokens
            .iter()
            .map(|&token| u32::from_le_bytes(token))
            .collect(),
    })
}

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*array)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.array::<1>()? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    fn take_all(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
