//! Finds where a text without words can be cut: between characters that no token joins.

use std::collections::HashSet;

use tokenizers::tokenizer::pattern::Pattern;
use tokenizers::{ModelWrapper, Result, Tokenizer};

use super::long_word::is_joinable;

/// Pairs of characters that no token of a BPE vocabulary contains, so that merges never join them.
#[derive(Debug)]
pub(super) struct Unjoined {
    joined: HashSet<(char, char)>,
    /// Characters that are tokens. Several others may become one unknown token.
    known: HashSet<char>,
    /// Whether every byte is a token.
    bytes: bool,
}

impl Unjoined {
    pub(super) fn of(inner: &Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = inner.get_model() else {
            return None;
        };
        if !is_joinable(model) || model.ignore_merges {
            return None;
        }
        let vocabulary = inner.get_vocab(false);
        let bytes = (0..=255_u8).map(|byte| format!("<{byte:#04X}>"));
        let bytes: HashSet<String> = bytes.collect();
        // Merges of bytes are not examined below.
        let holds_byte = |token: &str| {
            let mut places = token.match_indices("<0x");
            places.any(|(at, _)| {
                token
                    .get(at..at + 6)
                    .is_some_and(|part| bytes.contains(part))
            })
        };
        if vocabulary
            .keys()
            .any(|token| !bytes.contains(token) && holds_byte(token))
        {
            return None;
        }
        let mut joined = HashSet::new();
        for token in vocabulary.keys().filter(|token| !bytes.contains(*token)) {
            joined.extend(token.chars().zip(token.chars().skip(1)));
        }
        let single = |token: &String| {
            let mut characters = token.chars();
            characters.next().filter(|_| characters.next().is_none())
        };
        Some(Self {
            joined,
            known: vocabulary.keys().filter_map(single).collect(),
            bytes: model.byte_fallback && bytes.iter().all(|byte| vocabulary.contains_key(byte)),
        })
    }

    fn cuts(&self, before: char, after: char) -> bool {
        let known = |character| self.bytes || self.known.contains(&character);
        !self.joined.contains(&(before, after)) && known(before) && known(after)
    }
}

impl Pattern for &Unjoined {
    fn find_matches(&self, inside: &str) -> Result<Vec<((usize, usize), bool)>> {
        let mut found = Vec::new();
        let mut start = 0;
        let mut before = None;
        for (at, character) in inside.char_indices() {
            if before.is_some_and(|before| self.cuts(before, character)) {
                found.push(((start, at), true));
                start = at;
            }
            before = Some(character);
        }
        found.push(((start, inside.len()), true));
        Ok(found)
    }
}
