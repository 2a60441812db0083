//! The wire form of `POST /v1/chat/interactive` (`LMDeploy`, until July 2026): one JSON object a line.

use serde_json::Value;

use super::json::{push_string, write_bytes};
use super::reply::{Choice, Usage};
use crate::error::Error;
use crate::sched::FinishReason;

fn push_object(
    out: &mut Vec<u8>,
    text: &str,
    usage: &Usage,
    reason: Option<&str>,
    error: Option<&Error>,
) {
    let Usage {
        prompt_tokens,
        history_tokens,
        completion_tokens,
        ..
    } = usage;
    let input_tokens = prompt_tokens - history_tokens;
    out.extend_from_slice(b"{\"text\":");
    push_string(out, text);
    write_bytes(
        out,
        format_args!(
            ",\"tokens\":{completion_tokens},\"input_tokens\":{input_tokens},\"history_tokens\":{history_tokens},\
             \"finish_reason\":"
        ),
    );
    match reason {
        Some(reason) => write_bytes(out, format_args!("\"{reason}\"")),
        None => out.extend_from_slice(b"null"),
    }
    if let Some(error) = error {
        let object = Value::Object(error.to_json());
        write_bytes(out, format_args!(",\"error\":{object}"));
    }
    out.push(b'}');
}

pub(super) fn line(out: &mut Vec<u8>, text: &str, usage: &Usage) {
    push_object(out, text, usage, None, None);
    out.push(b'\n');
}

pub(super) fn last_line(out: &mut Vec<u8>, text: &str, usage: &Usage, reason: FinishReason) {
    push_object(out, text, usage, Some(reason.as_str()), None);
    out.push(b'\n');
}

pub(super) fn whole(out: &mut Vec<u8>, choice: &Choice, usage: &Usage) {
    let reason = choice.finish.map_or("abort", FinishReason::as_str);
    push_object(out, &choice.text, usage, Some(reason), None);
}

pub(super) fn error_line(out: &mut Vec<u8>, error: &Error, usage: &Usage) {
    push_object(out, "", usage, Some("error"), Some(error));
    out.push(b'\n');
}
