//! Writes calls for `/v1/responses` as the client described its tools: functions, functions in namespaces, and custom tools.

use super::custom::{custom_input, is_custom};
use super::head::Head;
use super::json::{push_string, write_bytes};

/// Writes a call. Its arguments are reported once it ends.
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
