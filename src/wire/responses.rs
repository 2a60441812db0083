//! The wire form of `POST /v1/responses` (`OpenAI` API reference, "Responses" and its "Streaming events").

use super::blocks::{Block, Blocks, Change};
use super::choice::Choice;
use super::chunk::push_tokens;
use super::custom::{custom_input, is_custom};
use super::delta::{TokenLogprob, Usage};
use super::format::WireFormat;
use super::head::Head;
use super::json::{push_string, write_bytes};
use super::response_calls::push_call;
use super::said::{Reads, Said};
use crate::error::Error;
use crate::sched::FinishReason;

/// The state of a response.
#[derive(Clone, Copy)]
enum Status<'a> {
    Running,
    Ended(FinishReason),
    Failed(&'a Error),
}

/// The state of an item that another item follows.
const ENDED: Status<'_> = Status::Ended(FinishReason::Stop);

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

    /// The status of an item. An item that was cut off, or whose response failed, is incomplete.
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

/// Writes the id of the item at index `place` of the output.
fn push_item_id(out: &mut Vec<u8>, head: &Head, place: usize, block: &Block) {
    let unique = head.id.trim_start_matches("resp_");
    let kind = match block {
        Block::Reasoning(_) => "rs",
        Block::Text { .. } => "msg",
        Block::Call { name, .. } if is_custom(head, name) => "ctc",
        Block::Call { .. } => "fc",
    };
    write_bytes(out, format_args!("\"{kind}_{unique}_out{place}\""));
}

/// Writes a part of an item's content. `empty`: as it begins.
fn push_part(out: &mut Vec<u8>, block: &Block, empty: bool) {
    let (text, logprobs) = if empty {
        ("", [].as_slice())
    } else {
        (block.text(), block.logprobs())
    };
    if matches!(block, Block::Reasoning(_)) {
        out.extend_from_slice(b"{\"type\":\"reasoning_text\",\"text\":");
        push_string(out, text);
        out.push(b'}');
        return;
    }
    out.extend_from_slice(b"{\"type\":\"output_text\",\"text\":");
    push_string(out, text);
    out.extend_from_slice(b",\"annotations\":[],\"logprobs\":[");
    push_tokens(out, logprobs, false);
    out.extend_from_slice(b"]}");
}

/// Writes an item. An item in progress has no content yet.
fn push_item(out: &mut Vec<u8>, head: &Head, blocks: &Blocks, place: usize, status: Status<'_>) {
    let block = &blocks.list()[place];
    let empty = matches!(status, Status::Running);
    out.extend_from_slice(b"{\"id\":");
    push_item_id(out, head, place, block);
    let word = status.item_word();
    if let Block::Call {
        call,
        name,
        arguments,
    } = block
    {
        let id = blocks.call_id("call_", head, *call);
        let arguments = if empty { "" } else { arguments };
        push_call(out, head, &id, (name, arguments), word);
        return;
    }
    let kind = if matches!(block, Block::Reasoning(_)) {
        "\"reasoning\",\"summary\":[]"
    } else {
        "\"message\",\"role\":\"assistant\""
    };
    write_bytes(
        out,
        format_args!(",\"type\":{kind},\"status\":\"{word}\",\"content\":["),
    );
    if !empty {
        push_part(out, block, false);
    }
    out.extend_from_slice(b"]}");
}

fn push_usage(out: &mut Vec<u8>, usage: &Usage, reasoning_tokens: usize) {
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
             \"output_tokens\":{completion_tokens},\"output_tokens_details\":{{\"reasoning_tokens\":{reasoning_tokens}}},\
             \"total_tokens\":{total}}}"
        ),
    );
}

/// Writes a response. `blocks` is its output, complete except for the end of the last block. None before the output begins.
fn push_response(out: &mut Vec<u8>, head: &Head, blocks: Option<&Blocks>, status: Status<'_>) {
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
    let count = blocks.map_or(0, |blocks| blocks.list().len());
    for (blocks, place) in blocks
        .into_iter()
        .flat_map(|blocks| (0..count).map(move |at| (blocks, at)))
    {
        if place > 0 {
            out.push(b',');
        }
        let status = if place + 1 < count { ENDED } else { status };
        push_item(out, head, blocks, place, status);
    }
    out.extend_from_slice(b"],\"usage\":");
    match (status, blocks) {
        (Status::Ended(_), Some(blocks)) => {
            push_usage(out, &head.usage, blocks.reasoning_tokens());
        }
        _ => out.extend_from_slice(b"null"),
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
    blocks: Option<&Blocks>,
    status: Status<'_>,
) {
    push_event(out, head, event, |out, head| {
        out.extend_from_slice(b"\"response\":");
        push_response(out, head, blocks, status);
    });
}

/// Writes an event about an item's text, or about its only part if the item has parts.
fn push_text_event(
    out: &mut Vec<u8>,
    head: &mut Head,
    event: &str,
    (place, block): (usize, &Block),
    write: impl FnOnce(&mut Vec<u8>),
) {
    push_event(out, head, event, |out, head| {
        out.extend_from_slice(b"\"item_id\":");
        push_item_id(out, head, place, block);
        write_bytes(out, format_args!(",\"output_index\":{place},"));
        if !matches!(block, Block::Call { .. }) {
            out.extend_from_slice(b"\"content_index\":0,");
        }
        write(out);
    });
}

fn push_item_event(
    out: &mut Vec<u8>,
    head: &mut Head,
    event: &str,
    (blocks, place): (&Blocks, usize),
    status: Status<'_>,
) {
    push_event(out, head, event, |out, head| {
        write_bytes(out, format_args!("\"output_index\":{place},\"item\":"));
        push_item(out, head, blocks, place, status);
    });
}

/// The name of a text's events.
const fn text_event(block: &Block, done: bool) -> &'static str {
    match (block, done) {
        (Block::Reasoning(_), false) => "response.reasoning_text.delta",
        (Block::Reasoning(_), true) => "response.reasoning_text.done",
        (Block::Text { .. }, false) => "response.output_text.delta",
        (Block::Text { .. }, true) => "response.output_text.done",
        (Block::Call { .. }, false) => "response.function_call_arguments.delta",
        (Block::Call { .. }, true) => "response.function_call_arguments.done",
    }
}

fn push_logprobs(out: &mut Vec<u8>, block: &Block, logprobs: &[TokenLogprob]) {
    if matches!(block, Block::Text { .. }) {
        out.extend_from_slice(b",\"logprobs\":[");
        push_tokens(out, logprobs, false);
        out.push(b']');
    }
}

fn open(out: &mut Vec<u8>, head: &mut Head, blocks: &Blocks, place: usize) {
    let event = "response.output_item.added";
    push_item_event(out, head, event, (blocks, place), Status::Running);
    let block = &blocks.list()[place];
    if !matches!(block, Block::Call { .. }) {
        let event = "response.content_part.added";
        push_text_event(out, head, event, (place, block), |out| {
            out.extend_from_slice(b"\"part\":");
            push_part(out, block, true);
        });
    }
}

/// Writes the text of a custom tool's call in one piece, because it is known only once the arguments are complete.
fn push_custom_input(out: &mut Vec<u8>, head: &mut Head, (place, block): (usize, &Block)) {
    for (event, key) in [("delta", "delta"), ("done", "input")] {
        let event = format!("response.custom_tool_call_input.{event}");
        push_text_event(out, head, &event, (place, block), |out| {
            write_bytes(out, format_args!("\"{key}\":"));
            push_string(out, &custom_input(block.text()));
        });
    }
}

fn close(out: &mut Vec<u8>, head: &mut Head, blocks: &Blocks, place: usize, status: Status<'_>) {
    let block = &blocks.list()[place];
    if matches!(block, Block::Call { name, .. } if is_custom(head, name)) {
        push_custom_input(out, head, (place, block));
        let event = "response.output_item.done";
        push_item_event(out, head, event, (blocks, place), status);
        return;
    }
    let what: &[u8] = if matches!(block, Block::Call { .. }) {
        b"\"arguments\":"
    } else {
        b"\"text\":"
    };
    push_text_event(out, head, text_event(block, true), (place, block), |out| {
        out.extend_from_slice(what);
        push_string(out, block.text());
        push_logprobs(out, block, block.logprobs());
    });
    if !matches!(block, Block::Call { .. }) {
        let event = "response.content_part.done";
        push_text_event(out, head, event, (place, block), |out| {
            out.extend_from_slice(b"\"part\":");
            push_part(out, block, false);
        });
    }
    let event = "response.output_item.done";
    push_item_event(out, head, event, (blocks, place), status);
}

fn changes(out: &mut Vec<u8>, head: &mut Head, blocks: &Blocks, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Opened(place) => open(out, head, blocks, *place),
            Change::Closed(place) => close(out, head, blocks, *place, ENDED),
            Change::Grew {
                block: place,
                text,
                logprobs,
            } => {
                let block = &blocks.list()[*place];
                if matches!(block, Block::Call { name, .. } if is_custom(head, name)) {
                    continue;
                }
                let event = text_event(block, false);
                push_text_event(out, head, event, (*place, block), |out| {
                    out.extend_from_slice(b"\"delta\":");
                    push_string(out, &block.text()[text.clone()]);
                    push_logprobs(out, block, &block.logprobs()[logprobs.clone()]);
                });
            }
        }
    }
}

/// `POST /v1/responses`.
#[derive(Debug)]
pub(super) struct Responses;

impl WireFormat for Responses {
    fn name(&self) -> &'static str {
        "responses"
    }

    fn reads(&self) -> Reads {
        Reads::Blocks
    }

    fn opening(&self, out: &mut Vec<u8>, head: &mut Head, _: usize) {
        for event in ["response.created", "response.in_progress"] {
            push_response_event(out, head, event, None, Status::Running);
        }
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
        reason: FinishReason,
    ) {
        let (blocks, status) = (&choice.blocks, Status::Ended(reason));
        changes(out, head, blocks, said.changes());
        if let Some(place) = blocks.list().len().checked_sub(1) {
            close(out, head, blocks, place, status);
        }
        push_response_event(out, head, status.event(), Some(blocks), status);
    }

    fn whole(&self, out: &mut Vec<u8>, head: &Head, choices: &[Choice]) {
        let choice = &choices[0];
        let reason = choice.finish.unwrap_or(FinishReason::Abort);
        push_response(out, head, Some(&choice.blocks), Status::Ended(reason));
    }

    fn error(&self, out: &mut Vec<u8>, head: &mut Head, choices: &[Choice], error: &Error) {
        let status = Status::Failed(error);
        push_response_event(out, head, status.event(), Some(&choices[0].blocks), status);
    }
}
