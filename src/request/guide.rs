//! What the text of an answer must be, as a client asks for it.

use serde::Deserialize;
use serde_json::Value;

use super::check_count;
use crate::error::{Error, Result};

/// Longest grammar, schema or regular expression, in bytes (of JSON, for a schema); the choices of a request together too. It
/// bounds memory alone: what compiling may cost has limits of its own.
pub const MAX_GUIDE_BYTES: usize = 4 << 20;
/// Most texts of a choice.
pub const MAX_GUIDE_CHOICES: usize = 65_536;

/// What the text of an answer must be.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Guide {
    /// One JSON object.
    JsonObject,
    /// JSON that a schema allows.
    JsonSchema {
        /// The schema: an object, or `true`.
        schema: Value,
        /// Refuse a schema with keywords that cannot be enforced; otherwise those are passed over.
        #[serde(default)]
        strict: bool,
    },
    /// Text that a regular expression matches as a whole.
    Regex {
        /// In the syntax of Rust's `regex` crate.
        pattern: String,
    },
    /// One of some texts.
    Choice {
        /// The texts.
        choices: Vec<String>,
    },
    /// Text of a context-free grammar.
    Lark {
        /// In llguidance's variant of Lark's syntax; begins at the rule `start`.
        grammar: String,
    },
}

/// White space between the tokens of an answer's JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whitespace {
    /// None.
    #[default]
    Compact,
    /// As the model likes, within a limit.
    Free,
}

impl Guide {
    pub(super) fn check(&self, param: &str) -> Result<()> {
        let bytes = match self {
            Self::JsonObject => 0,
            Self::JsonSchema { schema, .. } => {
                if !matches!(schema, Value::Object(_) | Value::Bool(true)) {
                    let message = "the JSON schema must be an object or true; false allows no text, and other \
                        values are not schemas";
                    return Err(Error::invalid(param, message));
                }
                schema.to_string().len()
            }
            Self::Regex { pattern } => pattern.len(),
            Self::Choice { choices } => {
                check_count(param, choices.len(), MAX_GUIDE_CHOICES)?;
                if choices.is_empty() || choices.iter().any(String::is_empty) {
                    return Err(Error::invalid(
                        param,
                        "a choice must have at least one text, and no text may be empty",
                    ));
                }
                choices.iter().map(String::len).sum()
            }
            Self::Lark { grammar } => grammar.len(),
        };
        check_bytes(param, bytes)
    }
}

/// Refuses what a grammar is made of, if it is longer than [`MAX_GUIDE_BYTES`].
///
/// # Errors
/// `invalid_value` (400).
pub fn check_bytes(param: &str, bytes: usize) -> Result<()> {
    if bytes <= MAX_GUIDE_BYTES {
        return Ok(());
    }
    Err(Error::invalid(
        param,
        format!("{param} may have at most {MAX_GUIDE_BYTES} bytes, but {bytes} were given"),
    ))
}
