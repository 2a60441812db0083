//! Converts tokens to text, one at a time.

use super::table::{Piece, Scheme, fallback_byte};
use super::tokenizer::Tokenizer;

/// The state of decoding one sequence incrementally.
///
/// The deltas of [`push`](Self::push) and the rest that [`flush`](Self::flush) gives, joined, are exactly
/// [`Tokenizer::decode`] of all tokens; bytes that are no UTF-8 become U+FFFD just as there. A delta never ends within a
/// character. A token costs time in proportion to its own length, however long the sequence is.
#[derive(Debug, Clone, Default)]
pub struct Detokenizer {
    /// Whether special tokens are left out.
    skip_special: bool,
    /// Whether any text was output. Text is cut off the front only once.
    begun: bool,
    /// Number of characters already cut off the front.
    cut: usize,
    /// Bytes that are not a whole character yet.
    pending: Vec<u8>,
    /// The last delta, if it could not be borrowed from the tokenizer.
    delta: String,
    /// For `Scheme::Decoder`: the tokens that are not output yet, after the token that decides how they join.
    window: Vec<u32>,
    /// Number of tokens of `window` that are output already.
    context: usize,
}

impl Detokenizer {
    /// An empty sequence. `skip_special`: special tokens add no text.
    pub fn new(skip_special: bool) -> Self {
        Self {
            skip_special,
            ..Self::default()
        }
    }

    /// Adds one token, and returns the text that it completes, which is often empty. An unknown id adds nothing, as in
    /// [`Tokenizer::decode`].
    pub fn push<'a>(&'a mut self, tokenizer: &'a Tokenizer, token: u32) -> &'a str {
        let table = tokenizer.table();
        if self.skip_special && table.is_special(token) {
            return "";
        }
        let piece = table.piece(token);
        match (table.scheme(), piece) {
            (_, Piece::Absent) => "",
            (Scheme::Bytes, Piece::Text(text)) if self.pending.is_empty() => text,
            (Scheme::Bytes, Piece::Text(text)) => self.push_bytes(text.as_bytes()),
            (Scheme::Bytes, Piece::Bytes(bytes)) => self.push_bytes(bytes),
            (Scheme::Pieces { .. }, Piece::Bytes(bytes)) => {
                self.pending.extend_from_slice(bytes);
                ""
            }
            (Scheme::Pieces { count, .. }, Piece::Text(text))
                if self.pending.is_empty() && (self.begun || count == 0) =>
            {
                text
            }
            (Scheme::Pieces { content, count }, Piece::Text(text)) => {
                self.delta.clear();
                self.end_run();
                self.delta.push_str(text);
                self.cut_front(content, count);
                &self.delta
            }
            (Scheme::Decoder { byte_runs }, _) => self.push_window(tokenizer, token, byte_runs),
        }
    }

    /// Returns the text that waited for more tokens. The sequence is then empty again.
    pub fn flush(&mut self, tokenizer: &Tokenizer) -> String {
        self.delta.clear();
        match tokenizer.table().scheme() {
            Scheme::Bytes => self.delta.push_str(&String::from_utf8_lossy(&self.pending)),
            Scheme::Pieces { content, count } => {
                self.end_run();
                self.cut_front(content, count);
            }
            Scheme::Decoder { .. } => self.end_window(tokenizer),
        }
        std::mem::replace(self, Self::new(self.skip_special)).delta
    }

    fn push_bytes(&mut self, bytes: &[u8]) -> &str {
        self.pending.extend_from_slice(bytes);
        self.delta.clear();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.delta.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (text, tail) = rest.split_at(error.valid_up_to());
                    self.delta.push_str(&String::from_utf8_lossy(text));
                    // No length: the rest is the beginning of a character that more bytes may complete.
                    let Some(invalid) = error.error_len() else {
                        rest = tail;
                        break;
                    };
                    self.delta.push(char::REPLACEMENT_CHARACTER);
                    rest = &tail[invalid..];
                }
            }
        }
        let done = self.pending.len() - rest.len();
        self.pending.drain(..done);
        &self.delta
    }

    /// Ends a run of byte tokens. If the whole run is UTF-8 it is text, otherwise each byte becomes U+FFFD.
    fn end_run(&mut self) {
        if let Ok(text) = std::str::from_utf8(&self.pending) {
            self.delta.push_str(text);
        } else {
            self.delta.extend(std::iter::repeat_n(
                char::REPLACEMENT_CHARACTER,
                self.pending.len(),
            ));
        }
        self.pending.clear();
    }

    fn cut_front(&mut self, content: char, count: usize) {
        if self.begun {
            return;
        }
        let cut = self
            .delta
            .chars()
            .take(count - self.cut)
            .take_while(|&c| c == content)
            .count();
        self.delta.drain(..cut * content.len_utf8());
        self.cut += cut;
        self.begun = !self.delta.is_empty() || self.cut == count;
    }

    fn push_window(&mut self, tokenizer: &Tokenizer, token: u32, byte_runs: bool) -> &str {
        self.window.push(token);
        self.delta.clear();
        let open_run = byte_runs
            && matches!(tokenizer.table().piece(token), Piece::Text(text) if fallback_byte(text).is_some());
        if open_run {
            return "";
        }
        let text = tokenizer.decode_whole(&self.window);
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return "";
        }
        self.take_window(tokenizer, &text);
        &self.delta
    }

    fn end_window(&mut self, tokenizer: &Tokenizer) {
        let text = tokenizer.decode_whole(&self.window);
        self.take_window(tokenizer, &text);
    }

    /// Outputs the new part of `text`, which is that of the whole window. The last token stays as context, because a decoder may
    /// join a token to the one before it, or treat the first token differently.
    fn take_window(&mut self, tokenizer: &Tokenizer, text: &str) {
        let known = tokenizer.decode_whole(&self.window[..self.context]);
        let common: usize = text
            .chars()
            .zip(known.chars())
            .take_while(|(a, b)| a == b)
            .map(|(c, _)| c.len_utf8())
            .sum();
        self.delta.push_str(&text[common..]);
        let done = self.window.len().saturating_sub(1);
        self.window.drain(..done);
        self.context = self.window.len();
    }
}

impl Tokenizer {
    /// The text of `tokens`. Invalid UTF-8 becomes U+FFFD. Unknown ids add nothing.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        if let Scheme::Decoder { .. } = self.table().scheme() {
            let kept: Vec<u32> = tokens
                .iter()
                .copied()
                .filter(|&id| !(skip_special && self.table().is_special(id)))
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
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::fixtures;

    fn streamed(tokenizer: &Tokenizer, tokens: &[u32], skip_special: bool) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(skip_special);
        let mut deltas: Vec<String> = tokens
            .iter()
            .map(|&token| detokenizer.push(tokenizer, token).to_owned())
            .collect();
        deltas.push(detokenizer.flush(tokenizer));
        deltas
    }

    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn a_character_comes_out_when_its_last_byte_is_there() {
        let deltas = streamed(&fixtures::byte_level(), &bytes("a你"), true);
        assert_eq!(deltas, ["a", "", "", "你", ""]);
    }

    #[test]
    fn invalid_bytes_come_out_as_soon_as_they_are_known_to_be_invalid() {
        let tokenizer = fixtures::byte_level();
        assert_eq!(
            streamed(&tokenizer, &[0xE4, 0xBD, 0x41, 0xFF], true),
            ["", "", "\u{FFFD}A", "\u{FFFD}", ""]
        );
        assert_eq!(
            streamed(&tokenizer, &[0xF0, 0x9F], true),
            ["", "", "\u{FFFD}"]
        );
    }

    #[test]
    fn a_run_of_byte_tokens_is_text_only_as_a_whole() {
        let tokenizer = fixtures::byte_fallback();
        let a = tokenizer.token_to_id("a").unwrap();
        assert_eq!(
            streamed(&tokenizer, &[3 + 0xC3, 3 + 0xA9, a], true),
            ["", "", "éa", ""]
        );
        assert_eq!(
            streamed(&tokenizer, &[3 + 0xC3, 3 + 0xA9, 3 + 0xFF], true).concat(),
            "\u{FFFD}".repeat(3)
        );
        assert_eq!(
            streamed(&tokenizer, &[3 + 0xC3, 2, 3 + 0xA9], true).concat(),
            "é"
        );
        assert_eq!(
            streamed(&tokenizer, &[3 + 0xC3, 2, 3 + 0xA9], false).concat(),
            "\u{FFFD}</s>\u{FFFD}"
        );
    }

    #[test]
    fn one_leading_space_is_cut_once() {
        let tokenizer = fixtures::byte_fallback();
        let id = |token| tokenizer.token_to_id(token).unwrap();
        assert_eq!(
            streamed(&tokenizer, &[id(""), id("▁a"), id("▁a")], true),
            ["", "a", " a", ""]
        );
        assert_eq!(
            streamed(&tokenizer, &[id("▁▁"), id("a")], true).concat(),
            " a"
        );
        assert_eq!(
            streamed(&tokenizer, &[3 + 0x20, 3 + 0x20, id("a")], true).concat(),
            " a"
        );
        assert_eq!(
            streamed(&tokenizer, &[3 + 0x20, 3 + 0x20], true).concat(),
            " "
        );
        assert_eq!(
            streamed(&tokenizer, &[2, id("▁a")], false).concat(),
            "</s> a"
        );
    }

    #[test]
    fn word_parts_join_the_word_before() {
        let tokenizer = fixtures::word_piece();
        let tokens = tokenizer.encode("The undoing.", true).unwrap();
        assert_eq!(
            streamed(&tokenizer, &tokens, true),
            ["", "the", " un", "do", "ing", ".", "", ""]
        );
    }

    #[test]
    fn unknown_ids_add_nothing() {
        assert_eq!(
            streamed(
                &fixtures::byte_level(),
                &[104, 4_000_000_000, 105, 261],
                true
            )
            .concat(),
            "hi"
        );
    }

    fn tokens_below(limit: u32) -> impl Strategy<Value = Vec<u32>> {
        proptest::collection::vec(0..limit, 0..60)
    }

    proptest! {
        #[test]
        fn deltas_join_to_the_lossy_text_of_the_bytes(tokens in tokens_below(262), skip in any::<bool>()) {
            let tokenizer = fixtures::byte_level();
            let kept = tokens.iter().filter(|&&token| !(skip && tokenizer.is_special(token)));
            let bytes: Vec<u8> = kept.filter_map(|&token| tokenizer.token_bytes(token)).flatten().copied().collect();
            prop_assert_eq!(streamed(&tokenizer, &tokens, skip).concat(), String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn deltas_join_to_what_the_decoder_of_the_vocabulary_gives(tokens in tokens_below(270), skip in any::<bool>()) {
            let tokenizer = fixtures::byte_fallback();
            let oracle = tokenizer.inner_decode(&tokens, skip);
            prop_assert_eq!(streamed(&tokenizer, &tokens, skip).concat(), oracle);
        }

        #[test]
        fn deltas_join_to_what_a_word_decoder_gives(tokens in tokens_below(14), skip in any::<bool>()) {
            let tokenizer = fixtures::word_piece();
            let oracle = tokenizer.inner_decode(&tokens, skip);
            prop_assert_eq!(streamed(&tokenizer, &tokens, skip).concat(), oracle);
        }

        #[test]
        fn a_delta_never_ends_within_a_character(text in any::<String>()) {
            let tokenizer = fixtures::byte_level();
            let deltas = streamed(&tokenizer, &bytes(&text), false);
            let whole = deltas.iter().all(|delta| !delta.contains(char::REPLACEMENT_CHARACTER));
            prop_assert!(whole || text.contains(char::REPLACEMENT_CHARACTER));
            prop_assert_eq!(deltas.concat(), text);
        }
    }
}
