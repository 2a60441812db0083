//! The wire form of `POST /v1/responses` (`OpenAI` API reference, "Responses" and its "Streaming events").

use super::chat::push_tokens;
use super::json::{push_string, write_bytes};
use super::reply::{Choice, Head, TokenLogprob, Usage};
use crate::error::Error;
use crate::sched::FinishReason;

/// How far a response has come.
#[derive(Clone, Copy)]
enum Status<'a> {
    Running,
    Ended(FinishReason),
    Failed(&'a Error),
}

impl Status<'_> {
    const fn word(self) -> &'static str {
        match self {
            Self::Running => "in_progress",
            Self::Ended(FinishReason::Stop) => "completed",
            Self::Ended(FinishReason::Length) => "incomplete",
            Self::Ended(FinishReason::Abort) => "cancelled",
            Self::Failed(_) => "failed",
        }
    }

    /// An item has no word of its own for what was cut short.
    const fn item_word(self) -> &'static str {
        match self {
            Self::Running => "in_progress",
            Self::Ended(FinishReason::Stop) => "completed",
            Self::Ended(_) | Self::Failed(_) => "incomplete",
        }
    }

    const fn event(self) -> &'static str {
        match self {
            Self::Running => "response.in_progress",
            Self::Ended(FinishReason::Stop) => "response.completed",
            Self::Ended(_) => "response.incomplete",
            Self::Failed(_) => "response.failed",
        }
    }
}

fn push_event(
    out: &mut Vec<u8>,
    head: &mut Head,
    event: &str,
    write: impl FnOnce(&mut Vec<u8>, &Head),
) {
    write_bytes(
        out,
        format_args!(
            "event: {event}\ndata: {{\"type\":\"{event}\",\"sequence_number\":{},",
            head.events
        ),
    );
    head.events += 1;
    write(out, head);
    out.extend_from_slice(b"}\n\n");
}

/// The id of the one message of a response.
fn push_item_id(out: &mut Vec<u8>, head: &Head) {
    let unique = head.id.trim_start_matches("resp_");
    write_bytes(out, format_args!("\"msg_{unique}\""));
}

fn push_part(out: &mut Vec<u8>, text: &str, logprobs: &[TokenLogprob]) {
    out.extend_from_slice(b"{\"type\":\"output_text\",\"text\":");
    push_string(out, text);
    out.extend_from_slice(b",\"annotations\":[],\"logprobs\":[");
    push_tokens(out, logprobs);
    out.extend_from_slice(b"]}");
}

fn push_item(out: &mut Vec<u8>, head: &Head, choice: Option<&Choice>, status: Status<'_>) {
    out.extend_from_slice(b"{\"id\":");
    push_item_id(out, head);
    write_bytes(
        out,
        format_args!(
            ",\"type\":\"message\",\"role\":\"assistant\",\"status\":\"{}\",\"content\":[",
            status.item_word()
        ),
    );
    if let Some(choice) = choice {
        push_part(out, &choice.text, &choice.logprobs);
    }
    out.extend_from_slice(b"]}");
}

fn push_usage(out: &mut Vec<u8>, usage: &Usage) {
    let Usage {
        prompt_tokens,
        cached_tokens,
        completion_tokens,
        ..
    } = usage;
    let total = prompt_tokens + completion_tokens;
    write_bytes(
        out,
        format_args!(
            "{{\"input_tokens\":{prompt_tokens},\"input_tokens_details\":\
             {{\"cached_tokens\":{cached_tokens},\"cache_write_tokens\":0}},\
             \"output_tokens\":{completion_tokens},\"output_tokens_details\":{{\"reasoning_tokens\":0}},\
             \"total_tokens\":{total}}}"
        ),
    );
}

fn push_response(out: &mut Vec<u8>, head: &Head, choice: Option<&Choice>, status: Status<'_>) {
    out.extend_from_slice(b"{\"id\":");
    push_string(out, &head.id);
    write_bytes(
        out,
        format_args!(
            ",\"object\":\"response\",\"created_at\":{},\"status\":\"{}\",\"error\":",
            head.created,
            status.word()
        ),
    );
    if let Status::Failed(error) = status {
        out.extend_from_slice(b"{\"code\":\"server_error\",\"message\":");
        push_string(out, &error.message);
        out.push(b'}');
    } else {
        out.extend_from_slice(b"null");
    }
    out.extend_from_slice(b",\"incomplete_details\":");
    out.extend_from_slice(if matches!(status, Status::Ended(FinishReason::Length)) {
        b"{\"reason\":\"max_output_tokens\"}".as_slice()
    } else {
        b"null"
    });
    out.extend_from_slice(b",\"model\":");
    push_string(out, &head.model);
    out.extend_from_slice(b",\"output\":[");
    if choice.is_some() {
        push_item(out, head, choice, status);
    }
    out.extend_from_slice(b"],\"usage\":");
    if matches!(status, Status::Ended(_)) {
        push_usage(out, &head.usage);
    } else {
        out.extend_from_slice(b"null");
    }
    for (name, value) in &head.envelope {
        out.push(b',');
        push_string(out, name);
        write_bytes(out, format_args!(":{value}"));
    }
    out.push(b'}');
}

fn push_response_event(
    out: &mut Vec<u8>,
    head: &mut Head,
    event: &str,
    choice: Option<&Choice>,
    status: Status<'_>,
) {
    push_event(out, head, event, |out, head| {
        out.extend_from_slice(b"\"response\":");
        push_response(out, head, choice, status);
    });
}

/// An event about the text of the one part of the one item.
fn push_part_event(
    out: &mut Vec<u8>,
    head: &mut Head,
    event: &str,
    write: impl FnOnce(&mut Vec<u8>),
) {
    push_event(out, head, event, |out, head| {
        out.extend_from_slice(b"\"item_id\":");
        push_item_id(out, head);
        out.extend_from_slice(b",\"output_index\":0,\"content_index\":0,");
        write(out);
    });
}

fn push_item_event(
    out: &mut Vec<u8>,
    head: &mut Head,
    event: &str,
    choice: Option<&Choice>,
    status: Status<'_>,
) {
    push_event(out, head, event, |out, head| {
        out.extend_from_slice(b"\"output_index\":0,\"item\":");
        push_item(out, head, choice, status);
    });
}

pub(super) fn opening(out: &mut Vec<u8>, head: &mut Head) {
    for event in ["response.created", "response.in_progress"] {
        push_response_event(out, head, event, None, Status::Running);
    }
    push_item_event(
        out,
        head,
        "response.output_item.added",
        None,
        Status::Running,
    );
    push_part_event(out, head, "response.content_part.added", |out| {
        out.extend_from_slice(b"\"part\":");
        push_part(out, "", &[]);
    });
}

pub(super) fn delta(out: &mut Vec<u8>, head: &mut Head, text: &str, logprobs: &[TokenLogprob]) {
    push_part_event(out, head, "response.output_text.delta", |out| {
        out.extend_from_slice(b"\"delta\":");
        push_string(out, text);
        out.extend_from_slice(b",\"logprobs\":[");
        push_tokens(out, logprobs);
        out.push(b']');
    });
}

/// `choice` has the whole text, of which `text` is the end that was not yet sent.
pub(super) fn last(
    out: &mut Vec<u8>,
    head: &mut Head,
    text: &str,
    choice: &Choice,
    reason: FinishReason,
) {
    let unsent = &choice.logprobs[choice.sent_logprobs..];
    if !text.is_empty() || !unsent.is_empty() {
        delta(out, head, text, unsent);
    }
    push_part_event(out, head, "response.output_text.done", |out| {
        out.extend_from_slice(b"\"text\":");
        push_string(out, &choice.text);
        out.extend_from_slice(b",\"logprobs\":[");
        push_tokens(out, &choice.logprobs);
        out.push(b']');
    });
    push_part_event(out, head, "response.content_part.done", |out| {
        out.extend_from_slice(b"\"part\":");
        push_part(out, &choice.text, &choice.logprobs);
    });
    let status = Status::Ended(reason);
    push_item_event(out, head, "response.output_item.done", Some(choice), status);
    push_response_event(out, head, status.event(), Some(choice), status);
}

pub(super) fn whole(out: &mut Vec<u8>, head: &Head, choice: &Choice) {
    let reason = choice.finish.unwrap_or(FinishReason::Abort);
    push_response(out, head, Some(choice), Status::Ended(reason));
}

pub(super) fn failed(out: &mut Vec<u8>, head: &mut Head, choice: &Choice, error: &Error) {
    let status = Status::Failed(error);
    push_response_event(out, head, status.event(), Some(choice), status);
}
