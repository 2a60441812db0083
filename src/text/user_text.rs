//! Texts of users and tools must stay text. What looks like a special token in them is tokenized as ordinary characters, so that
//! nobody can end a message, or begin another one, from within their own.

use std::borrow::Cow;

use aho_corasick::AhoCorasick;
use serde_json::Value;

use super::tokenizer::{Tokenizer, Watch};
use crate::error::{Error, Result};

/// Separates two characters of a user's text that must not become one token in a rendered text. It is not a character (Unicode 3.4,
/// "Noncharacters"). If a client sends it, it becomes U+FFFD.
pub const MARK: char = '\u{fdd0}';

/// The texts of a tokenizer's special tokens.
#[derive(Debug)]
pub struct SpecialTexts(AhoCorasick);

impl SpecialTexts {
    /// The special tokens of `tokenizer` with more than one character.
    ///
    /// # Errors
    /// `internal_error` if they are too many to look for.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let ids = 0..tokenizer.vocab_size() as u32;
        let special = ids.filter(|&id| tokenizer.is_special(id));
        let texts = special
            .filter_map(|id| std::str::from_utf8(tokenizer.token_bytes(id)?).ok())
            .filter(|text| text.chars().count() > 1);
        AhoCorasick::new(texts)
            .map(Self)
            .map_err(|e| Error::internal(format!("the special tokens cannot be looked for: {e}")))
    }

    /// Messages in which no text of a user or a tool is read as a special token.
    pub fn escape<'a>(&self, messages: &'a [Value]) -> Cow<'a, [Value]> {
        let mut escaped = Cow::Borrowed(messages);
        for (at, message) in messages.iter().enumerate() {
            let trusted = ["system", "developer", "assistant"];
            let own = trusted.iter().any(|role| message["role"] == *role);
            if let Some(content) = self.content(&message["content"], own) {
                escaped.to_mut()[at]["content"] = content;
            }
        }
        escaped
    }

    /// A content with marks, if it needs any. `own`: its special tokens stay special tokens.
    fn content(&self, content: &Value, own: bool) -> Option<Value> {
        match content {
            Value::String(text) => Some(self.texts(&[text], own)?.swap_remove(0).into()),
            Value::Array(parts) => {
                let is_text = |part: &&Value| part["text"].is_string();
                let texts = parts.iter().filter(is_text);
                let texts: Vec<&str> = texts.filter_map(|part| part["text"].as_str()).collect();
                let mut marked = self.texts(&texts, own)?.into_iter();
                let mut parts = parts.clone();
                for part in parts.iter_mut().filter(|part| part["text"].is_string()) {
                    part["text"] = marked.next()?.into();
                }
                Some(parts.into())
            }
            _ => None,
        }
    }

    /// Texts that a template may write one after another, with marks. `None` if they need none.
    fn texts(&self, texts: &[&str], own: bool) -> Option<Vec<String>> {
        let mut whole = texts.concat();
        let noncharacter = whole.contains(MARK);
        let mut cuts = Vec::new();
        if !own {
            for found in self.0.find_overlapping_iter(&whole) {
                let first = whole[found.start()..].chars().next();
                cuts.push(found.start() + first.map_or(0, char::len_utf8));
            }
        }
        if cuts.is_empty() && !noncharacter {
            return None;
        }
        cuts.sort_unstable();
        cuts.dedup();
        whole.clear();
        let (mut out, mut begin, mut cuts) = (Vec::new(), 0, cuts.into_iter().peekable());
        for text in texts {
            let mut marked = String::with_capacity(text.len() + 8);
            let mut from = 0;
            while let Some(cut) = cuts.next_if(|&cut| cut < begin + text.len()) {
                marked += &text[from..cut - begin].replace(MARK, "\u{fffd}");
                marked.push(MARK);
                from = cut - begin;
            }
            marked += &text[from..].replace(MARK, "\u{fffd}");
            begin += text.len();
            out.push(marked);
        }
        Some(out)
    }
}

impl Tokenizer {
    /// The tokens of a rendered text. No token spans a [`MARK`], and the marks are removed. `continued`: the text follows existing
    /// tokens. Pieces and `watch` as in [`encode_watched`](Self::encode_watched).
    ///
    /// # Errors
    /// As [`encode_watched`](Self::encode_watched).
    pub fn encode_rendered(
        &self,
        text: &str,
        continued: bool,
        piece: usize,
        watch: &Watch<'_>,
    ) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for (at, part) in text.split(MARK).enumerate() {
            let before = ids.len();
            let watch = |more: usize| watch(before + more);
            ids.append(&mut if continued || at > 0 {
                self.encode_continued_watched(part, piece, &watch)?
            } else {
                self.encode_watched(part, false, piece, &watch)?
            });
        }
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn special() -> SpecialTexts {
        SpecialTexts(AhoCorasick::new(["<|end|>", "</s>", "|end|", "[INST]"]).unwrap())
    }

    #[test]
    fn special_tokens_of_users_and_tools_are_cut_and_those_of_others_are_not() {
        let messages = json!([
            {"role": "system", "content": "</s>"},
            {"role": "user", "content": "a</s>b<|end|>"},
            {"role": "assistant", "content": "</s>"},
            {"role": "tool", "content": "[INST]"},
            {"role": "user", "content": "plain <s> text"},
        ]);
        let messages = messages.as_array().unwrap();
        let escaped = special().escape(messages);
        let contents: Vec<&str> = escaped
            .iter()
            .map(|message| message["content"].as_str().unwrap())
            .collect();
        // The special token within the special token is separated too.
        let expected = [
            "</s>",
            "a<\u{fdd0}/s>b<\u{fdd0}|\u{fdd0}end|>",
            "</s>",
            "[\u{fdd0}INST]",
            "plain <s> text",
        ];
        assert_eq!(contents, expected);
        assert!(matches!(special().escape(&messages[4..]), Cow::Borrowed(_)));
    }

    #[test]
    fn a_token_in_two_parts_is_cut_and_noncharacters_are_replaced() {
        let messages = [
            json!({"role": "user", "content": [
                {"type": "text", "text": "x<"},
                {"type": "image_url", "image_url": {}},
                {"type": "text", "text": "/s>y"},
            ]}),
            json!({"role": "assistant", "content": "a\u{fdd0}</s>"}),
        ];
        let escaped = special().escape(&messages);
        assert_eq!(escaped[0]["content"][0]["text"], "x<");
        assert_eq!(escaped[0]["content"][2]["text"], "\u{fdd0}/s>y");
        assert_eq!(escaped[1]["content"], "a\u{fffd}</s>");
    }
}
