//! Converts a client's guide into a grammar of `llguidance`.

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::regex_to_lark;
use serde_json::{Value, json};

use super::lookahead::LookAhead;
use super::schema::{Spacing, prepared};
use crate::request::Guide;

/// Characters with a meaning in regular expressions.
const META: &str = r"\.+*?()|[]{}^$#&-~/";

/// A grammar before it is compiled.
#[derive(Debug, Clone)]
pub struct Grammar {
    source: TopLevelGrammar,
    param: String,
}

impl Grammar {
    /// The grammar of `guide`, which the client set in the field `param`. `spacing` applies to JSON.
    pub fn of(guide: &Guide, param: &str, spacing: Spacing) -> Self {
        Self::from_parts(vec![Self::single(guide, spacing)], param)
    }

    /// The first of `grammars` is the start, and refers to the others.
    pub(super) fn from_parts(grammars: Vec<GrammarWithLexer>, param: &str) -> Self {
        Self {
            source: TopLevelGrammar {
                grammars,
                max_tokens: None,
            },
            param: param.to_owned(),
        }
    }

    pub(super) fn single(guide: &Guide, spacing: Spacing) -> GrammarWithLexer {
        match guide {
            Guide::JsonObject => schema_grammar(&json!({"type": "object"}), true, spacing),
            Guide::JsonSchema { schema, strict } => schema_grammar(schema, *strict, spacing),
            Guide::Regex { pattern } => regex_grammar(pattern),
            Guide::Choice { choices } => {
                let choices: Vec<String> = choices.iter().map(|text| escape(text)).collect();
                GrammarWithLexer::from_regex(&choices.join("|"))
            }
            Guide::Lark { grammar } => GrammarWithLexer::from_lark(grammar.clone()),
        }
    }

    /// The request's field that sets it.
    pub fn param(&self) -> &str {
        &self.param
    }

    /// Equal for equal grammars.
    pub fn key(&self) -> String {
        // The source has only text and JSON, which always serialize.
        serde_json::to_string(&self.source).unwrap_or_default()
    }

    pub(super) fn source(&self) -> TopLevelGrammar {
        self.source.clone()
    }
}

/// The grammar of the JSON that `schema` allows. `strict`: a keyword that cannot be enforced is an error.
pub(super) fn schema_grammar(schema: &Value, strict: bool, spacing: Spacing) -> GrammarWithLexer {
    GrammarWithLexer::from_json_schema(prepared(schema, strict, spacing))
}

/// The texts that `pattern` matches as a whole. Look-ahead at its beginning becomes an intersection.
fn regex_grammar(pattern: &str) -> GrammarWithLexer {
    let Some(LookAhead {
        with,
        without,
        rest,
    }) = LookAhead::split(pattern)
    else {
        return GrammarWithLexer::from_regex(pattern);
    };
    let begins = |ahead: &String| {
        let ahead = regex_to_lark(ahead, "");
        match ahead.strip_suffix('$') {
            Some(whole) => format!("/{whole}/"),
            None => format!("/({ahead})(?s:.*)/"),
        }
    };
    let with = with.iter().map(|ahead| format!(" & {}", begins(ahead)));
    let without = without.iter().map(|ahead| format!(" & ~{}", begins(ahead)));
    let also: String = with.chain(without).collect();
    let rest = rest.trim_start_matches('^');
    let rest = regex_to_lark(rest.strip_suffix('$').unwrap_or(rest), "");
    GrammarWithLexer::from_lark(format!("start: TEXT\nTEXT: /{rest}/{also}\n"))
}

/// A regular expression that matches only `text`.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if META.contains(c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}
