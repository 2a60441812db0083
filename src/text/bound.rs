//! A lower bound of a text's number of tokens, from its bytes alone.

use std::collections::HashSet;

use tokenizers::normalizers::{NormalizerWrapper, Replace};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::Split;
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, ModelWrapper, Tokenizer};

use super::table::TokenTable;

/// Bytes that do not occur in UTF-8.
const NEVER: [u8; 13] = [
    0xC0, 0xC1, 0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFA, 0xFB, 0xFC, 0xFD, 0xFE, 0xFF,
];

/// The maximum number of bytes of text per token.
#[derive(Debug)]
pub(super) struct ByteBound {
    longest: usize,
    /// Bytes that may disappear, because the vocabulary does not have them.
    vanishing: Option<Box<[bool; 256]>>,
}

impl ByteBound {
    /// `None` if a token can stand for any number of bytes: an unknown word becomes one token, a normalizer or pre-tokenizer drops
    /// characters, or an added token absorbs the white space around it.
    pub(super) fn of(inner: &Tokenizer, table: &TokenTable) -> Option<Self> {
        let ratio = inner.get_normalizer().map_or(Some(1), shrinkage)?;
        if !inner.get_pre_tokenizer().is_none_or(keeps_all) {
            return None;
        }
        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let grows = |token: &AddedToken| token.lstrip || token.rstrip;
        if added.values().any(grows) {
            return None;
        }
        let vocabulary = inner.get_vocab(true);
        let byte_level = is_byte_level(inner);
        let vanishing = match inner.get_model() {
            ModelWrapper::BPE(model) => {
                let affixed =
                    model.continuing_subword_prefix.is_some() || model.end_of_word_suffix.is_some();
                let vocabulary: HashSet<&str> = vocabulary.keys().map(String::as_str).collect();
                if byte_level && !affixed {
                    missing_bytes(&vocabulary)
                } else if affixed || !(model.byte_fallback && has_byte_tokens(&vocabulary)) {
                    return None;
                } else {
                    None
                }
            }
            ModelWrapper::Unigram(model) if model.byte_fallback() => {
                let vocabulary: HashSet<&str> = vocabulary.keys().map(String::as_str).collect();
                if !has_byte_tokens(&vocabulary) {
                    return None;
                }
                None
            }
            _ => return None,
        };
        if ratio > 1 && vanishing.is_some() {
            return None;
        }
        // A token is at least as long as the text that it matches. If it is written in GPT-2's byte alphabet, the table knows its
        // bytes.
        let spelled = |(token, &id): (&String, &u32)| match added.get(&id) {
            None if byte_level => table.byte_len(id),
            _ => token.len(),
        };
        let normalized = added
            .keys()
            .filter_map(|&id| Some(inner.id_to_token(id)?.len()));
        let longest = vocabulary.iter().map(spelled).chain(normalized).max()?;
        Some(Self {
            longest: longest.max(1) * ratio,
            vanishing,
        })
    }

    /// Number of bytes of `text` that must be in tokens.
    pub(super) fn weight(&self, text: &str) -> usize {
        match &self.vanishing {
            None => text.len(),
            Some(vanishing) => text
                .bytes()
                .filter(|&byte| !vanishing[usize::from(byte)])
                .count(),
        }
    }

    /// The minimum number of tokens for this many bytes.
    pub(super) fn least_tokens(&self, weight: usize) -> usize {
        weight.div_ceil(self.longest)
    }
}

fn steps(pre_tokenizer: &PreTokenizerWrapper) -> &[PreTokenizerWrapper] {
    match pre_tokenizer {
        PreTokenizerWrapper::Sequence(steps) => steps.as_ref(),
        one => std::slice::from_ref(one),
    }
}

/// Whether words are written in GPT-2's byte alphabet.
pub(super) fn is_byte_level(inner: &Tokenizer) -> bool {
    let normalizers = match inner.get_normalizer() {
        None => &[],
        Some(NormalizerWrapper::Sequence(steps)) => steps.as_ref(),
        Some(one) => std::slice::from_ref(one),
    };
    let words = inner.get_pre_tokenizer().map_or(&[][..], steps);
    normalizers
        .iter()
        .any(|step| matches!(step, NormalizerWrapper::ByteLevel(_)))
        || words
            .iter()
            .any(|step| matches!(step, PreTokenizerWrapper::ByteLevel(_)))
}

/// Bytes without a token of their own in a byte-level vocabulary. They are left out of words.
fn missing_bytes(vocabulary: &HashSet<&str>) -> Option<Box<[bool; 256]>> {
    let mut missing = Box::new([true; 256]);
    for (byte, character) in byte_level_alphabet() {
        missing[usize::from(byte)] = !vocabulary.contains(character.to_string().as_str());
    }
    for byte in NEVER {
        missing[usize::from(byte)] = false;
    }
    missing.contains(&true).then_some(missing)
}

/// GPT-2's printable character for each byte.
fn byte_level_alphabet() -> impl Iterator<Item = (u8, char)> {
    let printable = |byte: &u8| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=255_u8)
        .filter(move |byte| !printable(byte))
        .zip('\u{100}'..);
    let same = (0..=255_u8)
        .filter(printable)
        .map(|byte| (byte, char::from(byte)));
    same.chain(others)
}

fn has_byte_tokens(vocabulary: &HashSet<&str>) -> bool {
    (0..=255_u8).all(|byte| vocabulary.contains(format!("<{byte:#04X}>").as_str()))
}

/// The maximum number of bytes of a text that can become one byte. `None`: any number.
fn shrinkage(normalizer: &NormalizerWrapper) -> Option<usize> {
    match normalizer {
        NormalizerWrapper::Prepend(_) | NormalizerWrapper::ByteLevel(_) => Some(1),
        NormalizerWrapper::NFD(_) | NormalizerWrapper::Lowercase(_) => Some(3),
        NormalizerWrapper::NFC(_) | NormalizerWrapper::NFKC(_) | NormalizerWrapper::NFKD(_) => {
            Some(4)
        }
        NormalizerWrapper::Replace(step) => {
            let (pattern, content) = (replaced(step)?, &step.content);
            (!content.is_empty()).then(|| pattern.len().div_ceil(content.len()).max(1))
        }
        NormalizerWrapper::Sequence(steps) => steps
            .as_ref()
            .iter()
            .try_fold(1, |ratio, step| Some(ratio * shrinkage(step)?)),
        _ => None,
    }
}

/// The text that this step replaces, if it replaces one fixed text.
pub(super) fn replaced(step: &Replace) -> Option<String> {
    let step = serde_json::to_value(step).ok()?;
    Some(step.get("pattern")?.get("String")?.as_str()?.to_owned())
}

/// Whether every character of a text ends up in a word.
fn keeps_all(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    steps(pre_tokenizer).iter().all(|step| match step {
        PreTokenizerWrapper::ByteLevel(_)
        | PreTokenizerWrapper::Metaspace(_)
        | PreTokenizerWrapper::Digits(_)
        | PreTokenizerWrapper::UnicodeScripts(_)
        | PreTokenizerWrapper::FixedLength(_) => true,
        PreTokenizerWrapper::Split(Split { behavior, .. }) => {
            *behavior != SplitDelimiterBehavior::Removed
        }
        PreTokenizerWrapper::Punctuation(step) => step.behavior != SplitDelimiterBehavior::Removed,
        PreTokenizerWrapper::Sequence(_) => keeps_all(step),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use tokenizers::normalizers::{Lowercase, NFC, NFD, NFKC, NFKD};
    use tokenizers::{NormalizedString, Normalizer};

    use super::*;
    use crate::text::fixtures;

    fn normalized(step: &impl Normalizer, text: &str) -> String {
        let mut text = NormalizedString::from(text);
        step.normalize(&mut text).unwrap();
        text.get().to_owned()
    }

    /// All characters that compose others or are composed of others, but only the first of Hangul.
    fn characters() -> impl Iterator<Item = char> {
        let ranges = [
            '\0'..='\u{33FF}',
            '\u{A000}'..='\u{AD00}',
            '\u{F000}'..='\u{12000}',
            '\u{1D000}'..='\u{1F300}',
            '\u{2F800}'..='\u{2FA20}',
        ];
        ranges.into_iter().flatten()
    }

    /// A composed character may come from as many bytes as the characters of its decomposition.
    fn worst(compose: &impl Normalizer, decompose: &impl Normalizer) -> f64 {
        let mut longest = std::collections::HashMap::<char, usize>::new();
        let mut decomposed = Vec::new();
        let mut ratio: f64 = 1.0;
        for character in characters() {
            let parts = normalized(decompose, &character.to_string());
            ratio = ratio.max(character.len_utf8() as f64 / parts.len() as f64);
            let mut all = parts.chars();
            if let (Some(only), None) = (all.next(), all.next()) {
                let most = longest.entry(only).or_default();
                *most = (*most).max(character.len_utf8());
            }
            decomposed.push((character, parts));
        }
        for (character, parts) in decomposed {
            if normalized(compose, &character.to_string()) != character.to_string() {
                continue;
            }
            let bytes: usize = parts.chars().map(|part| longest[&part]).sum();
            ratio = ratio.max(bytes as f64 / character.len_utf8() as f64);
        }
        ratio
    }

    #[test]
    fn normalizers_shrink_no_more_than_they_are_taken_to() {
        for (ratio, step) in [
            (worst(&NFC, &NFD), NormalizerWrapper::from(NFC)),
            (worst(&NFD, &NFD), NFD.into()),
            (worst(&NFKC, &NFKD), NFKC.into()),
            (worst(&NFKD, &NFKD), NFKD.into()),
        ] {
            let limit = shrinkage(&step).unwrap() as f64;
            assert!(ratio <= limit, "{step:?} shrinks by {ratio}");
        }
        let lowered = characters().map(|character| {
            let lower = normalized(&Lowercase, &character.to_string());
            character.len_utf8() as f64 / lower.len() as f64
        });
        assert!(lowered.fold(0.0, f64::max) <= 3.0);
    }

    #[test]
    fn the_longest_token_bounds_a_texts_tokens() {
        // Its longest tokens are "hell" and "<|end|>". The special one is longer.
        let tokenizer = fixtures::byte_level();
        assert_eq!(tokenizer.least_tokens(&"hell".repeat(7)), 4);
        let text = "<|end|>".repeat(9);
        assert_eq!(tokenizer.least_tokens(&text), 9);
        assert_eq!(tokenizer.encode(&text, false).unwrap().len(), 9);
        // SentencePiece's space may be written with three bytes.
        let tokenizer = fixtures::byte_fallback();
        let text = "▁▁".repeat(50);
        assert!(tokenizer.least_tokens(&text) <= tokenizer.encode(&text, false).unwrap().len());
        assert!(tokenizer.least_tokens(&text) >= 50);
    }

    #[test]
    fn where_text_may_vanish_nothing_is_said() {
        assert_eq!(fixtures::word_piece().least_tokens(&" ".repeat(1000)), 0);
    }
}
