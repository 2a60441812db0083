//! The wire form of `POST /v1/messages` (Anthropic API reference, "Messages" and "Streaming messages").

use serde_json::{Value, json};

use super::json::{push_string, write_bytes};
use super::reply::{Choice, Head, Usage};
use crate::error::{Error, Kind};
use crate::sched::FinishReason;

fn open(out: &mut Vec<u8>, event: &str) {
    write_bytes(
        out,
        format_args!("event: {event}\ndata: {{\"type\":\"{event}\""),
    );
}

const CLOSE: &[u8] = b"}\n\n";

/// Tokens that were read from the cache are not among the `input_tokens`.
fn push_usage(out: &mut Vec<u8>, usage: &Usage) {
    let Usage {
        prompt_tokens,
        cached_tokens,
        completion_tokens,
        ..
    } = usage;
    let input = prompt_tokens - cached_tokens;
    write_bytes(
        out,
        format_args!(
            "\"usage\":{{\"input_tokens\":{input},\"cache_creation_input_tokens\":0,\
             \"cache_read_input_tokens\":{cached_tokens},\"output_tokens\":{completion_tokens}}}"
        ),
    );
}

fn push_stop(out: &mut Vec<u8>, choice: Option<&Choice>) {
    let finish = choice.and_then(|choice| choice.finish);
    let stop_sequence = choice
        .filter(|_| finish == Some(FinishReason::Stop))
        .and_then(|choice| choice.stop_string.as_deref());
    let reason = match finish {
        None => "null",
        Some(FinishReason::Length) => "\"max_tokens\"",
        Some(FinishReason::Stop) if stop_sequence.is_some() => "\"stop_sequence\"",
        Some(FinishReason::Stop | FinishReason::Abort) => "\"end_turn\"",
    };
    write_bytes(
        out,
        format_args!("\"stop_reason\":{reason},\"stop_sequence\":"),
    );
    match stop_sequence {
        Some(text) => push_string(out, text),
        None => out.extend_from_slice(b"null"),
    }
}

fn push_message(out: &mut Vec<u8>, head: &Head, choice: Option<&Choice>) {
    out.extend_from_slice(b"{\"id\":");
    push_string(out, &head.id);
    out.extend_from_slice(b",\"type\":\"message\",\"role\":\"assistant\",\"model\":");
    push_string(out, &head.model);
    out.extend_from_slice(b",\"content\":[");
    if let Some(choice) = choice {
        out.extend_from_slice(b"{\"type\":\"text\",\"text\":");
        push_string(out, &choice.text);
        out.push(b'}');
    }
    out.extend_from_slice(b"],");
    push_stop(out, choice);
    out.push(b',');
    push_usage(out, &head.usage);
    out.push(b'}');
}

pub(super) fn opening(out: &mut Vec<u8>, head: &Head) {
    open(out, "message_start");
    out.extend_from_slice(b",\"message\":");
    push_message(out, head, None);
    out.extend_from_slice(CLOSE);
    open(out, "content_block_start");
    out.extend_from_slice(b",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}");
    out.extend_from_slice(CLOSE);
}

pub(super) fn delta(out: &mut Vec<u8>, text: &str) {
    open(out, "content_block_delta");
    out.extend_from_slice(b",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":");
    push_string(out, text);
    out.push(b'}');
    out.extend_from_slice(CLOSE);
}

pub(super) fn last(out: &mut Vec<u8>, head: &Head, text: &str, choice: &Choice) {
    if !text.is_empty() {
        delta(out, text);
    }
    open(out, "content_block_stop");
    out.extend_from_slice(b",\"index\":0");
    out.extend_from_slice(CLOSE);
    open(out, "message_delta");
    out.extend_from_slice(b",\"delta\":{");
    push_stop(out, Some(choice));
    out.extend_from_slice(b"},");
    push_usage(out, &head.usage);
    out.extend_from_slice(CLOSE);
    open(out, "message_stop");
    out.extend_from_slice(CLOSE);
}

pub(super) fn whole(out: &mut Vec<u8>, head: &Head, choice: &Choice) {
    push_message(out, head, Some(choice));
}

pub(super) fn error_event(out: &mut Vec<u8>, error: &Error) {
    let mut object = error.to_json();
    let kind = match error.kind {
        Kind::Internal => "api_error",
        Kind::Unavailable => "overloaded_error",
        Kind::Busy => "rate_limit_error",
        Kind::NotFound => "not_found_error",
        Kind::Invalid | Kind::Conflict => "invalid_request_error",
    };
    object.insert("type".into(), json!(kind));
    open(out, "error");
    let object = Value::Object(object);
    write_bytes(out, format_args!(",\"error\":{object}"));
    out.extend_from_slice(CLOSE);
}
