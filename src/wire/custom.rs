//! Calls of custom tools, which the model sees as functions of one text.

use std::borrow::Cow;

use serde_json::Value;

use super::head::Head;

/// Whether a function, by the name that the model sees, is a custom tool.
pub(super) fn is_custom(head: &Head, name: &str) -> bool {
    head.call_forms.get(name).is_some_and(|form| form.custom)
}

/// The text that a custom tool is called with: its one argument, or all there is where the model wrote something else.
pub(super) fn custom_input(arguments: &str) -> Cow<'_, str> {
    match serde_json::from_str::<Value>(arguments) {
        Ok(Value::Object(mut object)) => match object.remove("input") {
            Some(Value::String(text)) => Cow::Owned(text),
            _ => Cow::Borrowed(arguments),
        },
        _ => Cow::Borrowed(arguments),
    }
}
