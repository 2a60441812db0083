//! Calls of custom tools, which the model sees as functions with one text argument.

use std::borrow::Cow;

use serde_json::Value;

use super::head::Head;

/// Whether a function is a custom tool, by the name that the model sees.
pub(super) fn is_custom(head: &Head, name: &str) -> bool {
    head.call_forms.get(name).is_some_and(|form| form.custom)
}

/// The text for a custom tool: its one argument, or the whole text if the model wrote something else.
pub(super) fn custom_input(arguments: &str) -> Cow<'_, str> {
    match serde_json::from_str::<Value>(arguments) {
        Ok(Value::Object(mut object)) => match object.remove("input") {
            Some(Value::String(text)) => Cow::Owned(text),
            _ => Cow::Borrowed(arguments),
        },
        _ => Cow::Borrowed(arguments),
    }
}
