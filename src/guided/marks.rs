//! Converts fixed texts of an answer into Lark's syntax. Markers that are single tokens become token references.

use serde_json::Value;

use crate::text::Tokenizer;

/// Converts texts that may contain special tokens.
pub(super) struct Marks<'a> {
    pub(super) tokenizer: Option<&'a Tokenizer>,
    /// Texts that are single tokens in some vocabularies.
    pub(super) tokens: Vec<&'static str>,
}

impl Marks<'_> {
    /// The special token of `text`, if it is one.
    pub(super) fn special(&self, text: &str) -> Option<u32> {
        let tokenizer = self.tokenizer?;
        let id = tokenizer.token_to_id(text)?;
        tokenizer.is_special(id).then_some(id)
    }

    /// `text` as a sequence; empty for an empty text.
    pub(super) fn sequence(&self, text: &str) -> String {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let next = self
                .tokens
                .iter()
                .filter_map(|token| Some((rest.find(token)?, *token, self.special(token)?)))
                .min_by_key(|&(at, token, _)| (at, std::cmp::Reverse(token.len())));
            let Some((at, token, id)) = next else {
                parts.push(quoted(rest));
                break;
            };
            if at > 0 {
                parts.push(quoted(&rest[..at]));
            }
            parts.push(format!("<[{id}]>"));
            rest = &rest[at + token.len()..];
        }
        parts.join(" ")
    }

    /// Whether `text` begins with a special token.
    pub(super) fn begins_special(&self, text: &str) -> bool {
        self.sequence(text).starts_with("<[")
    }

    /// A rule of this name: everything that `pattern` matches, up to and including `end`. `pattern` may be several regular
    /// expressions, intersected.
    pub(super) fn up_to(&self, name: &str, pattern: &str, end: &str) -> String {
        if self.begins_special(end) {
            return format!("{name}: {pattern} {}\n", self.sequence(end));
        }
        // If `end` contains a special token after its beginning, the text ends before that token.
        let text_only = self
            .tokens
            .iter()
            .filter_map(|token| self.special(token).and(end.find(token)))
            .min()
            .unwrap_or(end.len());
        let (suffix, rest) = end.split_at(text_only);
        let rest = self.sequence(rest);
        if rest.is_empty() {
            return format!("{name}[suffix={}]: {pattern}\n", quoted(suffix));
        }
        format!(
            "{name}: {name}_text {rest}\n{name}_text[suffix={}]: {pattern}\n",
            quoted(suffix)
        )
    }
}

/// A text in Lark's syntax.
pub(super) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
