//! From what a client asks for to a grammar of `llguidance`.

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::{Map, Value, json};

use crate::request::Guide;

/// Between the tokens of JSON: nothing, a space, or a new line with its indentation. Without a limit, a model that has
/// nothing more to say writes white space for ever.
const WHITESPACE: &str = r" |\n[ \t]{0,32}";
/// Characters that mean something in a regular expression.
const META: &str = r"\.+*?()|[]{}^$#&-~/";

/// A grammar before it is compiled.
#[derive(Debug, Clone)]
pub struct Grammar {
    source: TopLevelGrammar,
    param: String,
}

impl Grammar {
    /// The grammar of `guide`, which the client's field `param` asks for.
    pub fn of(guide: &Guide, param: &str) -> Self {
        Self::from_parts(vec![Self::single(guide)], param)
    }

    /// The first of `grammars` begins, and names the others.
    pub(super) fn from_parts(grammars: Vec<GrammarWithLexer>, param: &str) -> Self {
        Self {
            source: TopLevelGrammar {
                grammars,
                max_tokens: None,
            },
            param: param.to_owned(),
        }
    }

    pub(super) fn single(guide: &Guide) -> GrammarWithLexer {
        match guide {
            Guide::JsonObject => schema_grammar(&json!({"type": "object"}), true),
            Guide::JsonSchema { schema, strict } => schema_grammar(schema, *strict),
            Guide::Regex { pattern } => GrammarWithLexer::from_regex(pattern),
            Guide::Choice { choices } => {
                let choices: Vec<String> = choices.iter().map(|text| escape(text)).collect();
                GrammarWithLexer::from_regex(&choices.join("|"))
            }
            Guide::Lark { grammar } => GrammarWithLexer::from_lark(grammar.clone()),
        }
    }

    /// The field of a request that asks for it.
    pub fn param(&self) -> &str {
        &self.param
    }

    /// Equal for equal grammars.
    pub fn key(&self) -> String {
        // What is serialized holds texts and JSON alone, so nothing in it can fail.
        serde_json::to_string(&self.source).unwrap_or_default()
    }

    pub(super) fn source(&self) -> TopLevelGrammar {
        self.source.clone()
    }
}

/// The grammar of JSON that `schema` allows. `strict`: a keyword that cannot be enforced is an error.
pub(super) fn schema_grammar(schema: &Value, strict: bool) -> GrammarWithLexer {
    let mut schema = match schema {
        Value::Object(object) => object.clone(),
        _ => Map::new(),
    };
    let options = json!({
        "whitespace_flexible": true,
        "whitespace_pattern": WHITESPACE,
        "lenient": !strict,
    });
    schema.insert("x-guidance".to_owned(), options);
    GrammarWithLexer::from_json_schema(Value::Object(schema))
}

/// A regular expression that matches `text` alone.
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
