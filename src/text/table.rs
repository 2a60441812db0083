//! The text of each token, computed once when a tokenizer is loaded, so that decoding is a table look-up.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::tokenizer::Decoder;

use crate::error::{Error, Result};

/// Maximum token id. The table has an entry for each id.
const MAX_TOKENS: u32 = 1 << 24;

/// How the text of a sequence results from the texts of its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    /// Each token is a list of bytes. The text is their concatenation, as UTF-8.
    Bytes,
    /// Each token is text, or one byte of a run (byte fallback). A run is text only if it is UTF-8 as a whole. Up to `count`
    /// leading `content` characters of the whole text are removed.
    Pieces { content: char, count: usize },
    /// Only the tokenizer's decoder can tell. `byte_runs`: it joins runs of byte tokens.
    Decoder { byte_runs: bool },
}

/// What one token adds to a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// Nothing, because no token has this id.
    Absent,
    /// Whole characters.
    Text(&'a str),
    /// Bytes that are not text by themselves.
    Bytes(&'a [u8]),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Absent,
    Text,
    Bytes,
}

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    start: u32,
    len: u32,
    kind: Kind,
    special: bool,
}

/// The pieces of all tokens, by id.
#[derive(Debug)]
pub(super) struct TokenTable {
    entries: Vec<Entry>,
    text: String,
    bytes: Vec<u8>,
    scheme: Scheme,
}

impl TokenTable {
    /// Reads every token of `inner`.
    pub(super) fn new(inner: &tokenizers::Tokenizer) -> Result<Self> {
        let mut ids: Vec<u32> = inner.get_vocab(true).into_values().collect();
        ids.extend(
            inner
                .get_added_vocabulary()
                .get_added_tokens_decoder()
                .keys(),
        );
        let len = ids.iter().max().map_or(0, |&id| id.saturating_add(1));
        if len > MAX_TOKENS {
            let message = format!(
                "token ids must lie below {MAX_TOKENS}, but the tokenizer has {}",
                len - 1
            );
            return Err(Error::invalid("tokenizer", message));
        }
        let plan = DecoderPlan::of(inner.get_decoder())?;
        let scheme = plan.scheme();
        let mut table = Self {
            entries: vec![Entry::default(); len as usize],
            text: String::new(),
            bytes: Vec::new(),
            scheme,
        };
        for id in 0..len {
            let Some(token) = inner.id_to_token(id) else {
                continue;
            };
            let special = inner.get_added_vocabulary().is_special_token(&token);
            match plan {
                DecoderPlan::Bytes => table.push(id, &byte_level_bytes(&token), special),
                DecoderPlan::Pieces {
                    replace,
                    byte_fallback,
                    ..
                } => {
                    let token = apply(replace, token)?;
                    match fallback_byte(&token).filter(|_| byte_fallback) {
                        Some(byte) => table.push_bytes(id, &[byte], special),
                        None => table.push(id, token.as_bytes(), special),
                    }
                }
                DecoderPlan::Other(_) => table.push(id, token.as_bytes(), special),
            }
        }
        Ok(table)
    }

    fn push(&mut self, id: u32, bytes: &[u8], special: bool) {
        if let Ok(text) = std::str::from_utf8(bytes) {
            let start = self.text.len() as u32;
            self.text.push_str(text);
            self.entries[id as usize] = Entry {
                start,
                len: text.len() as u32,
                kind: Kind::Text,
                special,
            };
        } else {
            self.push_bytes(id, bytes, special);
        }
    }

    fn push_bytes(&mut self, id: u32, bytes: &[u8], special: bool) {
        let start = self.bytes.len() as u32;
        self.bytes.extend_from_slice(bytes);
        self.entries[id as usize] = Entry {
            start,
            len: bytes.len() as u32,
            kind: Kind::Bytes,
            special,
        };
    }

    pub(super) fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// One more than the highest id.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes that a token adds to a text.
    pub(super) fn byte_len(&self, id: u32) -> usize {
        self.entries
            .get(id as usize)
            .map_or(0, |entry| entry.len as usize)
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.entries
            .get(id as usize)
            .is_some_and(|entry| entry.special)
    }

    #[inline]
    pub(super) fn piece(&self, id: u32) -> Piece<'_> {
        let Some(&Entry {
            start, len, kind, ..
        }) = self.entries.get(id as usize)
        else {
            return Piece::Absent;
        };
        let range = start as usize..start as usize + len as usize;
        match kind {
            Kind::Absent => Piece::Absent,
            Kind::Text => Piece::Text(&self.text[range]),
            Kind::Bytes => Piece::Bytes(&self.bytes[range]),
        }
    }
}

/// The decoder's steps, as far as they are supported.
#[derive(Clone, Copy)]
enum DecoderPlan<'a> {
    Bytes,
    Pieces {
        replace: &'a [DecoderWrapper],
        byte_fallback: bool,
        content: char,
        count: usize,
    },
    Other(&'a [DecoderWrapper]),
}

impl<'a> DecoderPlan<'a> {
    fn of(decoder: Option<&'a DecoderWrapper>) -> Result<Self> {
        let chain = match decoder {
            None => &[],
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
            Some(one) => std::slice::from_ref(one),
        };
        for link in chain {
            if let DecoderWrapper::Strip(strip) = link
                && strip.stop > 0
            {
                let message =
                    "a tokenizer whose decoder strips the end of its tokens is not supported";
                return Err(Error::invalid("tokenizer", message));
            }
        }
        if matches!(chain, [DecoderWrapper::ByteLevel(_)]) {
            return Ok(Self::Bytes);
        }
        if decoder.is_none() {
            return Ok(Self::Other(chain));
        }
        let replaces = chain
            .iter()
            .take_while(|link| matches!(link, DecoderWrapper::Replace(_)))
            .count();
        let (replace, rest) = chain.split_at(replaces);
        let (byte_fallback, rest) = match rest {
            [DecoderWrapper::ByteFallback(_), rest @ ..] => (true, rest),
            rest => (false, rest),
        };
        Ok(match rest {
            [] | [DecoderWrapper::Fuse(_)] => Self::Pieces {
                replace,
                byte_fallback,
                content: ' ',
                count: 0,
            },
            [DecoderWrapper::Fuse(_), DecoderWrapper::Strip(strip)] => Self::Pieces {
                replace,
                byte_fallback,
                content: strip.content,
                count: strip.start,
            },
            _ => Self::Other(chain),
        })
    }

    fn scheme(self) -> Scheme {
        match self {
            Self::Bytes => Scheme::Bytes,
            Self::Pieces { content, count, .. } => Scheme::Pieces { content, count },
            Self::Other(chain) => {
                let byte_runs = chain
                    .iter()
                    .any(|link| matches!(link, DecoderWrapper::ByteFallback(_)));
                Scheme::Decoder { byte_runs }
            }
        }
    }
}

fn apply(chain: &[DecoderWrapper], token: String) -> Result<String> {
    let mut tokens = vec![token];
    for link in chain {
        tokens = link.decode_chain(tokens).map_err(|e| {
            Error::invalid("tokenizer", format!("the tokenizer's decoder fails: {e}"))
        })?;
    }
    Ok(tokens.concat())
}

/// The byte of a byte-fallback token such as `<0x0A>`.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// The bytes of a byte-level token. If a character is outside the byte alphabet, the token is an added token, and is its own text.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(byte_of_char)
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte of a character of GPT-2's byte alphabet. Printable Latin-1 characters stand for themselves; the other 68 bytes are
/// U+0100 and following.
fn byte_of_char(c: char) -> Option<u8> {
    match c as u32 {
        n @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(n as u8),
        n @ 0x100..=0x120 => Some((n - 0x100) as u8),
        n @ 0x121..=0x142 => Some((n - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}
