//! Calls in `/v1/responses`, told as the client described its tools: functions, those of namespaces, and custom tools.

use std::borrow::Cow;

use serde_json::Value;

use super::head::Head;
use super::json::{push_string, write_bytes};

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

/// A call. What it is called with is told once it ends.
pub(super) fn push_call(
    out: &mut Vec<u8>,
    head: &Head,
    call_id: &str,
    (name, arguments): (&str, &str),
    word: &str,
) {
    let form = head.call_forms.get(name);
    let custom = is_custom(head, name);
    let kind = if custom {
        "custom_tool_call"
    } else {
        "function_call"
    };
    write_bytes(
        out,
        format_args!(",\"type\":\"{kind}\",\"status\":\"{word}\",\"call_id\":"),
    );
    push_string(out, call_id);
    out.extend_from_slice(b",\"name\":");
    push_string(out, form.map_or(name, |form| &form.name));
    if let Some(namespace) = form.and_then(|form| form.namespace.as_ref()) {
        out.extend_from_slice(b",\"namespace\":");
        push_string(out, namespace);
    }
    if custom {
        out.extend_from_slice(b",\"input\":");
        push_string(out, &custom_input(arguments));
    } else {
        out.extend_from_slice(b",\"arguments\":");
        push_string(out, arguments);
    }
    out.push(b'}');
}
