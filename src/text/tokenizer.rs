//! Text to tokens, and whole sequences of tokens to text.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::tokenizer::Decoder;

use super::detokenizer::Detokenizer;
use super::from_gguf;
use super::prefix::WithoutPrefix;
use super::table::{Piece, Scheme, TokenTable};
use crate::error::{Error, Result};
use crate::gguf::GgufFile;

/// A vocabulary and the rules that split text into its tokens.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    table: TokenTable,
    /// How text is prepared without a space before its first word, where the vocabulary wants one.
    without_prefix: Option<WithoutPrefix>,
}

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json`. Truncation and padding that it may ask for are not applied: a prompt is
    /// never cut silently.
    ///
    /// # Errors
    /// `invalid_value` if it is no such file, or has a part that is not supported.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let refuse = |reason: String| {
            Error::invalid(
                "tokenizer",
                format!("tokenizer.json cannot be read: {reason}"),
            )
        };
        let inner = guarded(|| Ok(serde_json::from_slice::<tokenizers::Tokenizer>(json)?))
            .map_err(refuse)?;
        Self::new(inner)
    }

    /// Builds the tokenizer that a GGUF file's metadata describe.
    ///
    /// # Errors
    /// `invalid_value` if the metadata have none, contradict each other, or ask for rules that are not supported.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        Self::new(from_gguf::build(file)?)
    }

    fn new(mut inner: tokenizers::Tokenizer) -> Result<Self> {
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| Error::internal(e.to_string()))?;
        let table = TokenTable::new(&inner)?;
        let without_prefix = WithoutPrefix::of(&inner);
        Ok(Self {
            inner,
            table,
            without_prefix,
        })
    }

    /// The tokens of `text`; special tokens written out in it are recognised. `add_special` adds those that the model
    /// expects around a text (such as a beginning-of-text token); a chat template has written them already.
    ///
    /// # Errors
    /// `invalid_value` if the vocabulary has no way to express the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding =
            guarded(|| self.inner.encode_fast(text, add_special)).map_err(not_tokenized)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of `text` that goes on after tokens that are there already: without a beginning-of-text token, and without
    /// the space that some vocabularies put before the first word of a text.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_continued(&self, text: &str) -> Result<Vec<u32>> {
        let Some(bare) = &self.without_prefix else {
            return self.encode(text, false);
        };
        let (mut tokens, rest) =
            guarded(|| bare.encode_first(&self.inner, text)).map_err(not_tokenized)?;
        if !rest.is_empty() {
            tokens.extend(self.encode(rest, false)?);
        }
        Ok(tokens)
    }

    /// The text of `tokens`. Bytes that are no UTF-8 become U+FFFD; ids that are not in the vocabulary add nothing.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        if let Scheme::Decoder { .. } = self.table.scheme() {
            let kept: Vec<u32> = tokens
                .iter()
                .copied()
                .filter(|&id| !(skip_special && self.table.is_special(id)))
                .collect();
            return self.decode_whole(&kept);
        }
        let mut detokenizer = Detokenizer::new(skip_special);
        let mut text = String::new();
        for &token in tokens {
            text.push_str(detokenizer.push(self, token));
        }
        text.push_str(&detokenizer.flush(self));
        text
    }

    /// Asks the tokenizer's own decoder.
    pub(super) fn decode_whole(&self, tokens: &[u32]) -> String {
        let pieces: Vec<String> = tokens
            .iter()
            .filter_map(|&id| match self.table.piece(id) {
                Piece::Text(text) => Some(text.to_owned()),
                _ => None,
            })
            .collect();
        let Some(decoder) = self.inner.get_decoder() else {
            return pieces.join(" ");
        };
        if pieces.is_empty() {
            return String::new();
        }
        guarded(|| decoder.decode(pieces.clone())).unwrap_or_else(|_| pieces.concat())
    }

    /// One more than the highest token id.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// Whether `token` is a special token, which is no part of a text.
    pub fn is_special(&self, token: u32) -> bool {
        self.table.is_special(token)
    }

    /// The bytes that `token` adds to a text (before the leading space that some vocabularies cut from a text's front);
    /// `None` if no token has this id.
    pub fn token_bytes(&self, token: u32) -> Option<&[u8]> {
        match self.table.piece(token) {
            Piece::Absent => None,
            Piece::Text(text) => Some(text.as_bytes()),
            Piece::Bytes(bytes) => Some(bytes),
        }
    }

    /// Whether a text is its tokens' bytes joined, but for what is cut from its front.
    pub fn has_exact_bytes(&self) -> bool {
        !matches!(self.table.scheme(), Scheme::Decoder { .. })
    }

    /// The id of a token by its vocabulary entry, such as `<|im_end|>`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub(super) fn table(&self) -> &TokenTable {
        &self.table
    }
}

fn not_tokenized(reason: impl std::fmt::Display) -> Error {
    Error::invalid("prompt", format!("the text cannot be tokenized: {reason}"))
}

/// Calls into the crate, which asserts in places what a malformed tokenizer.json does not keep.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        // Its message may quote half a character, which no String may hold, of a merge that makes no sense.
        Ok(result) => {
            result.map_err(|e| String::from_utf8_lossy(e.to_string().as_bytes()).into_owned())
        }
        Err(_) => Err("the tokenizer is malformed".to_owned()),
    }
}

#[cfg(test)]
impl Tokenizer {
    /// Decodes as the crate underneath does, without the table.
    pub(super) fn inner_decode(&self, tokens: &[u32], skip_special: bool) -> String {
        self.inner
            .decode(tokens, skip_special)
            .expect("the crate decodes its own tokens")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::text::fixtures;

    #[test]
    fn special_tokens_in_the_text_are_recognised() {
        let tokenizer = fixtures::byte_level();
        assert_eq!(
            tokenizer.encode("hello<|end|>", false).unwrap(),
            [258, 111, 260]
        );
        assert!(tokenizer.is_special(260));
        assert!(!tokenizer.is_special(258));
        assert_eq!(tokenizer.vocab_size(), 261);
    }

    #[test]
    fn a_prompt_is_neither_cut_nor_padded() {
        let tokenizer = fixtures::word_piece();
        assert_eq!(
            tokenizer.encode("the the the the the the", false).unwrap(),
            [3; 6]
        );
        assert_eq!(tokenizer.encode("the", true).unwrap(), [1, 3, 2]);
    }

    #[test]
    fn a_token_says_its_bytes() {
        let tokenizer = fixtures::byte_level();
        assert_eq!(tokenizer.token_bytes(0xFF), Some(&[0xFF][..]));
        assert_eq!(tokenizer.token_bytes(259), Some("é".as_bytes()));
        assert_eq!(tokenizer.token_bytes(999), None);
        let tokenizer = fixtures::byte_fallback();
        assert_eq!(tokenizer.token_bytes(3 + 0xE4), Some(&[0xE4][..]));
        assert_eq!(
            tokenizer.token_bytes(tokenizer.token_to_id("▁a").unwrap()),
            Some(&b" a"[..])
        );
    }

    #[test]
    fn malformed_files_are_refused() {
        let whole = r#"{"version":"1.0","added_tokens":[],"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}"#;
        for end in 0..whole.len() {
            let error = Tokenizer::from_json(&whole.as_bytes()[..end]).unwrap_err();
            assert_eq!(error.kind, Kind::Invalid);
        }
        for json in [r"[1,2]", "null", r#"{"decoder":3}"#, "\u{0}"] {
            assert_eq!(
                Tokenizer::from_json(json.as_bytes()).unwrap_err().kind,
                Kind::Invalid
            );
        }
    }

    #[test]
    fn ids_have_a_limit() {
        let json = r#"{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":4000000000},"merges":[]}}"#;
        let error = Tokenizer::from_json(json.as_bytes()).unwrap_err();
        assert!(error.message.contains("4000000000"), "{error}");
    }
}
