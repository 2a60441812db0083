//! The wire form of `POST /v1/messages` (Anthropic API reference, "Messages" and "Streaming messages").

use serde_json::{Map, Value, json};

use super::blocks::{Block, Blocks, Change};
use super::choice::Choice;
use super::delta::Usage;
use super::format::WireFormat;
use super::head::Head;
use super::json::{push_string, write_bytes};
use super::said::{Reads, Said};
use crate::error::{Error, Kind};
use crate::sched::FinishReason;

fn open(out: &mut Vec<u8>, event: &str) {
    write_bytes(
        out,
        format_args!("event: {event}\ndata: {{\"type\":\"{event}\""),
    );
}

const CLOSE: &[u8] = b"}\n\n";

/// `input_tokens` does not include tokens that were read from the cache.
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
        Some(FinishReason::Stop) if choice.is_some_and(|choice| choice.blocks.has_calls()) => {
            "\"tool_use\""
        }
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

/// Writes a block. `empty`: as it begins.
fn push_block(out: &mut Vec<u8>, head: &Head, blocks: &Blocks, place: usize, empty: bool) {
    let block = &blocks.list()[place];
    let text = if empty { "" } else { block.text() };
    match block {
        Block::Text { .. } => {
            out.extend_from_slice(b"{\"type\":\"text\",\"text\":");
            push_string(out, text);
        }
        Block::Reasoning(_) => {
            out.extend_from_slice(b"{\"type\":\"thinking\",\"thinking\":");
            push_string(out, text);
            out.extend_from_slice(b",\"signature\":\"\"");
        }
        Block::Call { call, name, .. } => {
            out.extend_from_slice(b"{\"type\":\"tool_use\",\"id\":");
            push_string(out, &blocks.call_id("toolu_", head, *call));
            out.extend_from_slice(b",\"name\":");
            push_string(out, name);
            out.extend_from_slice(b",\"input\":");
            push_input(out, text, empty);
        }
    }
    out.push(b'}');
}

/// Writes the arguments, which must be an object. Other values are wrapped as Anthropic's documentation says.
fn push_input(out: &mut Vec<u8>, arguments: &str, empty: bool) {
    if empty {
        out.extend_from_slice(b"{}");
    } else if serde_json::from_str::<Map<String, Value>>(arguments).is_ok() {
        out.extend_from_slice(arguments.as_bytes());
    } else {
        out.extend_from_slice(b"{\"INVALID_JSON\":");
        push_string(out, arguments);
        out.push(b'}');
    }
}

fn push_message(out: &mut Vec<u8>, head: &Head, choice: Option<&Choice>) {
    out.extend_from_slice(b"{\"id\":");
    push_string(out, &head.id);
    out.extend_from_slice(b",\"type\":\"message\",\"role\":\"assistant\",\"model\":");
    push_string(out, &head.model);
    out.extend_from_slice(b",\"content\":[");
    if let Some(choice) = choice {
        let blocks = &choice.blocks;
        for place in 0..blocks.list().len() {
            if place > 0 {
                out.push(b',');
            }
            push_block(out, head, blocks, place, false);
        }
    }
    out.extend_from_slice(b"],");
    push_stop(out, choice);
    out.push(b',');
    push_usage(out, &head.usage);
    out.push(b'}');
}

fn close_block(out: &mut Vec<u8>, place: usize) {
    open(out, "content_block_stop");
    write_bytes(out, format_args!(",\"index\":{place}"));
    out.extend_from_slice(CLOSE);
}

fn changes(out: &mut Vec<u8>, head: &Head, blocks: &Blocks, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Opened(place) => {
                open(out, "content_block_start");
                write_bytes(out, format_args!(",\"index\":{place},\"content_block\":"));
                push_block(out, head, blocks, *place, true);
                out.extend_from_slice(CLOSE);
            }
            Change::Closed(place) => close_block(out, *place),
            Change::Grew { block, text, .. } => {
                let (kind, field) = match &blocks.list()[*block] {
                    Block::Text { .. } => ("text_delta", "text"),
                    Block::Reasoning(_) => ("thinking_delta", "thinking"),
                    Block::Call { .. } => ("input_json_delta", "partial_json"),
                };
                open(out, "content_block_delta");
                write_bytes(
                    out,
                    format_args!(",\"index\":{block},\"delta\":{{\"type\":\"{kind}\",\"{field}\":"),
                );
                push_string(out, &blocks.list()[*block].text()[text.clone()]);
                out.push(b'}');
                out.extend_from_slice(CLOSE);
            }
        }
    }
}

/// `POST /v1/messages`.
#[derive(Debug)]
pub(super) struct Messages;

impl WireFormat for Messages {
    fn name(&self) -> &'static str {
        "messages"
    }

    fn reads(&self) -> Reads {
        Reads::Blocks
    }

    fn opening(&self, out: &mut Vec<u8>, head: &mut Head, _: usize) {
        open(out, "message_start");
        out.extend_from_slice(b",\"message\":");
        push_message(out, head, None);
        out.extend_from_slice(CLOSE);
    }

    fn more(&self, out: &mut Vec<u8>, head: &mut Head, _: usize, choice: &Choice, said: &Said) {
        changes(out, head, &choice.blocks, said.changes());
    }

    fn last(
        &self,
        out: &mut Vec<u8>,
        head: &mut Head,
        _: usize,
        choice: &Choice,
        said: &Said,
        _: FinishReason,
    ) {
        changes(out, head, &choice.blocks, said.changes());
        if let Some(place) = choice.blocks.list().len().checked_sub(1) {
            close_block(out, place);
        }
        open(out, "message_delta");
        out.extend_from_slice(b",\"delta\":{");
        push_stop(out, Some(choice));
        out.extend_from_slice(b"},");
        push_usage(out, &head.usage);
        out.extend_from_slice(CLOSE);
        open(out, "message_stop");
        out.extend_from_slice(CLOSE);
    }

    fn whole(&self, out: &mut Vec<u8>, head: &Head, choices: &[Choice]) {
        push_message(out, head, choices.first());
    }

    fn error(&self, out: &mut Vec<u8>, _: &mut Head, _: &[Choice], error: &Error) {
        let mut object = error.to_json();
        object.insert("type".into(), json!(error_type(error)));
        open(out, "error");
        let object = Value::Object(object);
        write_bytes(out, format_args!(",\"error\":{object}"));
        out.extend_from_slice(CLOSE);
    }
}

const fn error_type(error: &Error) -> &'static str {
    match error.kind {
        Kind::Internal | Kind::StorageFull => "api_error",
        Kind::Unavailable => "overloaded_error",
        Kind::Busy => "rate_limit_error",
        Kind::NotFound => "not_found_error",
        Kind::Invalid | Kind::Conflict => "invalid_request_error",
    }
}
