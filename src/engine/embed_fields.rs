//! How error messages name the fields of an embedding request.

use serde::Deserialize;

use crate::error::Error;

/// The names that a route has for the fields of `/v1/embeddings`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FieldNames {
    /// The inputs.
    input: String,
    /// If the first inputs have a field of their own (the query of a rerank request): its name, and how many inputs it has.
    first: Option<(String, usize)>,
    dimensions: String,
    truncation: String,
}

impl Default for FieldNames {
    fn default() -> Self {
        Self {
            input: "input".into(),
            first: None,
            dimensions: "dimensions".into(),
            truncation: "truncate_prompt_tokens".into(),
        }
    }
}

impl FieldNames {
    /// An error about all inputs. The message begins with the field's name.
    pub(super) fn inputs_error(&self, message: &str) -> Error {
        Error::invalid(&self.input, format!("{} {message}", self.input))
    }

    /// An error about input `at`. The message is `before`, the input's place, and `after`.
    pub(super) fn input_error(&self, at: usize, before: &str, after: &str) -> Error {
        let (field, place) = self.place(at);
        Error::invalid(field, format!("{before}{place}{after}"))
    }

    /// The same for the field that sets how inputs are cut.
    pub(super) fn truncation_error(&self, at: usize, before: &str, after: &str) -> Error {
        let (_, place) = self.place(at);
        Error::invalid(&self.truncation, format!("{before}{place}{after}"))
    }

    /// An error about the number of dimensions. The message begins with the field's name.
    pub(super) fn dimensions_error(&self, message: &str) -> Error {
        Error::invalid(&self.dimensions, format!("{} {message}", self.dimensions))
    }

    /// The field of input `at`, and its place in that field.
    pub(super) fn place(&self, at: usize) -> (&str, String) {
        match &self.first {
            Some((field, 1)) if at == 0 => (field, field.clone()),
            Some((field, count)) if at < *count => (field, format!("{field}[{at}]")),
            first => {
                let at = at - first.as_ref().map_or(0, |&(_, count)| count);
                // A request of one text has no list, and so no place in it.
                let place = match self.input.as_str() {
                    "input" => format!("input {at}"),
                    field => format!("{field}[{at}]"),
                };
                (&self.input, place)
            }
        }
    }
}
