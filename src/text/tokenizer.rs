//! Converts text to tokens, and whole sequences of tokens to text.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::tokenizer::Decoder;

use super::bound::ByteBound;
use super::from_gguf;
use super::pieces::Pieces;
use super::prefix::WithoutPrefix;
use super::table::{Piece, Scheme, TokenTable};
use crate::error::{Error, Result};
use crate::gguf::GgufFile;

/// Called before each piece of a text is tokenized, with the minimum number of tokens of the text. An error ends the work.
pub type Watch<'a> = dyn Fn(usize) -> Result<()> + 'a;

/// Number of bytes of a text that are tokenized at once.
pub const PIECE_BYTES: usize = 32 << 10;
/// Maximum size of a text that must be cut into words at once: a million tokens of four bytes.
const MAX_WHOLE_BYTES: usize = 4 << 20;

/// A vocabulary and the rules that split text into its tokens.
#[derive(Debug)]
pub struct Tokenizer {
    pub(super) inner: tokenizers::Tokenizer,
    table: TokenTable,
    /// Normalization without a space before the first word, if the vocabulary adds one.
    without_prefix: Option<WithoutPrefix>,
    /// Absent: a token can stand for any number of bytes.
    bound: Option<ByteBound>,
    /// Absent: every text is tokenized as a whole, and this cannot be ended early.
    pieces: Option<Pieces>,
}

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json`. Truncation and padding in it are ignored: a prompt is never cut silently.
    ///
    /// # Errors
    /// `invalid_value` if it is malformed, or contains something unsupported.
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
    /// `invalid_value` if the metadata contain no tokenizer, contradict themselves, or need unsupported rules.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        Self::new(from_gguf::build(file)?)
    }

    fn new(mut inner: tokenizers::Tokenizer) -> Result<Self> {
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| Error::internal(e.to_string()))?;
        let table = TokenTable::new(&inner)?;
        let whole = Self {
            without_prefix: WithoutPrefix::of(&inner),
            bound: ByteBound::of(&inner, &table),
            pieces: None,
            inner,
            table,
        };
        let pieces = guarded(|| Ok(Pieces::of(&whole.inner, whole.without_prefix.is_some())))
            .unwrap_or_default();
        Ok(Self { pieces, ..whole })
    }

    /// The tokens of `text`. Special tokens written in it are recognized. `add_special` adds those that the model expects around a
    /// text, such as a beginning-of-text token; a chat template has written them already.
    ///
    /// # Errors
    /// `invalid_value` if the vocabulary cannot express the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.encode_watched(text, add_special, PIECE_BYTES, &|_| Ok(()))
    }

    /// Like [`encode`](Self::encode). A text of more than `piece` bytes is tokenized in pieces if that gives the same tokens, so
    /// that only one piece needs memory. `watch` is called before each piece with the minimum number of tokens of the text. Its
    /// error ends the work.
    ///
    /// # Errors
    /// As [`encode`](Self::encode), and those of `watch`.
    pub fn encode_watched(
        &self,
        text: &str,
        add_special: bool,
        piece: usize,
        watch: &Watch<'_>,
    ) -> Result<Vec<u32>> {
        let whole = |text: &str| {
            let encoding =
                guarded(|| self.inner.encode_fast(text, add_special)).map_err(not_tokenized)?;
            Ok(encoding.get_ids().to_vec())
        };
        if text.len() <= piece {
            watch(0)?;
            return whole(text);
        }
        let Some(pieces) = &self.pieces else {
            watch(self.least_tokens(text))?;
            check_whole(text)?;
            return whole(text);
        };
        let mut ids = Vec::new();
        if add_special {
            ids.extend_from_slice(pieces.prefix());
        }
        self.encode_pieces(pieces, text, false, piece, watch, &mut ids)?;
        if add_special {
            ids.extend_from_slice(pieces.suffix());
        }
        Ok(ids)
    }

    /// The tokens of `text` after existing tokens: without a beginning-of-text token, and without the space that some vocabularies
    /// put before the first word of a text.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_continued(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_continued_watched(text, PIECE_BYTES, &|_| Ok(()))
    }

    /// Like [`encode_continued`](Self::encode_continued), in pieces and watched like [`encode_watched`](Self::encode_watched).
    ///
    /// # Errors
    /// As [`encode_watched`](Self::encode_watched).
    pub fn encode_continued_watched(
        &self,
        text: &str,
        piece: usize,
        watch: &Watch<'_>,
    ) -> Result<Vec<u32>> {
        let Some(bare) = &self.without_prefix else {
            return self.encode_watched(text, false, piece, watch);
        };
        if text.len() > piece
            && let Some(pieces) = &self.pieces
        {
            let mut ids = Vec::new();
            self.encode_pieces(pieces, text, true, piece, watch, &mut ids)?;
            return Ok(ids);
        }
        watch(if text.len() <= piece {
            0
        } else {
            self.least_tokens(text)
        })?;
        check_whole(text)?;
        let (mut tokens, rest) =
            guarded(|| bare.encode_first(&self.inner, text)).map_err(not_tokenized)?;
        if !rest.is_empty() {
            tokens.extend(self.encode_watched(rest, false, piece, watch)?);
        }
        Ok(tokens)
    }

    fn encode_pieces(
        &self,
        pieces: &Pieces,
        text: &str,
        continued: bool,
        piece: usize,
        watch: &Watch<'_>,
        ids: &mut Vec<u32>,
    ) -> Result<()> {
        let mut left = self.weight(text);
        let (mut at, mut size) = (0, piece);
        if !pieces.cuts() {
            watch(self.least_of(left))?;
            check_whole(text)?;
            size = text.len();
        }
        while at < text.len() {
            let least = ids.len() + self.least_of(left);
            watch(least)?;
            let mut end = text.len().min(at + size);
            while !text.is_char_boundary(end) {
                end += 1;
            }
            let bare = self.without_prefix.as_ref();
            let bare = bare.filter(|_| continued || at > 0);
            let (part, last) = (&text[at..end], end == text.len());
            let before = ids.len();
            let look = |more: usize| watch(least.max(before + more));
            let encode = || pieces.encode(&self.inner, bare, part, last, look);
            let Some(encoded) = guarded(encode).map_err(not_tokenized)?? else {
                // This much text has no place to cut: read more.
                size *= 2;
                continue;
            };
            ids.extend(encoded.ids);
            left = left.saturating_sub(self.weight(&part[..encoded.bytes]));
            at += encoded.bytes;
            size = piece;
        }
        Ok(())
    }

    /// Whether long texts are tokenized in pieces.
    pub fn works_in_pieces(&self) -> bool {
        self.pieces.as_ref().is_some_and(Pieces::cuts)
    }

    /// The minimum number of tokens of `text`, by its bytes. 0 if the vocabulary gives no bound.
    pub fn least_tokens(&self, text: &str) -> usize {
        self.least_of(self.weight(text))
    }

    fn weight(&self, text: &str) -> usize {
        self.bound.as_ref().map_or(0, |bound| bound.weight(text))
    }

    fn least_of(&self, weight: usize) -> usize {
        self.bound
            .as_ref()
            .map_or(0, |bound| bound.least_tokens(weight))
    }

    /// Decodes with the tokenizer's own decoder.
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

    /// Whether `token` is a special token, which is not part of a text.
    pub fn is_special(&self, token: u32) -> bool {
        self.table.is_special(token)
    }

    /// The bytes that `token` adds to a text, before the leading space is removed that some vocabularies add. `None` if no token
    /// has this id.
    pub fn token_bytes(&self, token: u32) -> Option<&[u8]> {
        match self.table.piece(token) {
            Piece::Absent => None,
            Piece::Text(text) => Some(text.as_bytes()),
            Piece::Bytes(bytes) => Some(bytes),
        }
    }

    /// Whether a text equals the bytes of its tokens, except for what is removed from its beginning.
    pub fn has_exact_bytes(&self) -> bool {
        !matches!(self.table.scheme(), Scheme::Decoder { .. })
    }

    /// The id of a token by its text in the vocabulary, such as `<|im_end|>`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub(super) fn table(&self) -> &TokenTable {
        &self.table
    }
}

/// Refuses a text that must be cut into words at once and is too long for that.
fn check_whole(text: &str) -> Result<()> {
    if text.len() <= MAX_WHOLE_BYTES {
        return Ok(());
    }
    let message = format!(
        "this model's tokenizer takes texts of at most {MAX_WHOLE_BYTES} bytes, but {} were given",
        text.len()
    );
    Err(Error::invalid("prompt", message))
}

pub(super) fn not_tokenized(reason: impl std::fmt::Display) -> Error {
    Error::invalid("prompt", format!("the text cannot be tokenized: {reason}"))
}

/// Calls the crate, and converts a panic into an error. The crate asserts things that a malformed tokenizer.json may violate.
pub(super) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        // The message of an invalid merge may contain half a character, which no String may hold.
        Ok(result) => {
            result.map_err(|e| String::from_utf8_lossy(e.to_string().as_bytes()).into_owned())
        }
        Err(_) => Err("the tokenizer is malformed".to_owned()),
    }
}

#[cfg(test)]
impl Tokenizer {
    /// Decodes with the underlying crate, without the table.
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

    /// A tokenizer whose texts cannot be cut, because its pattern looks ahead without limit, and have no lower bound, because a
    /// token absorbs the space around it.
    fn uncut() -> Tokenizer {
        let split = r#"{"type":"Split","pattern":{"Regex":"a+b|a|[^a]+"},"behavior":"Isolated","invert":false}"#;
        let bytes = r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":false,"use_regex":false}"#;
        let mask = r#"{"id":2,"content":"<m>","special":true,"normalized":false,"single_word":false,"lstrip":true,"rstrip":true}"#;
        let json = format!(
            r#"{{"version":"1.0","added_tokens":[{mask}],"decoder":{bytes},
            "pre_tokenizer":{{"type":"Sequence","pretokenizers":[{split},{bytes}]}},
            "model":{{"type":"BPE","vocab":{{"a":0,"x":1}},"merges":[]}}}}"#
        );
        Tokenizer::from_json(json.as_bytes()).unwrap()
    }

    #[test]
    fn a_text_that_cannot_be_cut_is_left_in_the_middle_of_it_all_the_same() {
        let tokenizer = uncut();
        assert!(!tokenizer.works_in_pieces());
        assert_eq!(tokenizer.least_tokens("x"), 0);
        let text = "xa".repeat(50_000);
        assert_eq!(
            tokenizer.encode(&text, true).unwrap(),
            [1, 0].repeat(50_000)
        );
        let most = std::cell::Cell::new(0);
        let watch = |tokens| {
            most.set(tokens);
            if tokens > 1000 {
                return Err(Error::invalid("prompt", "it does not fit"));
            }
            Ok(())
        };
        let error = tokenizer
            .encode_watched(&text, true, PIECE_BYTES, &watch)
            .unwrap_err();
        assert_eq!(error.message, "it does not fit");
        assert!((1001..1500).contains(&most.get()), "{}", most.get());
    }

    #[test]
    fn a_text_that_cannot_be_cut_has_a_limit_in_bytes() {
        let text = "x".repeat(MAX_WHOLE_BYTES + 1);
        for error in [
            uncut().encode(&text, false).unwrap_err(),
            uncut().encode_continued(&text).unwrap_err(),
        ] {
            assert_eq!(error.kind, Kind::Invalid);
            assert!(
                error
                    .message
                    .contains("at most 4194304 bytes, but 4194305 were given")
            );
        }
        assert_eq!(
            fixtures::byte_level().encode(&text, false).unwrap().len(),
            text.len()
        );
    }
}
