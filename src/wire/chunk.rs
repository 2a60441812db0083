//! Parts that the chunks and objects of OpenAI's chat and text completions share (API reference, "Chat Completions").

use serde_json::Value;

use super::delta::{TokenLogprob, Usage};
use super::head::Head;
use super::json::{push_f32, push_string, write_bytes};
use super::token_ids::push_id_as_text;
use crate::error::Error;
use crate::request::UsageChunks;
use crate::sched::FinishReason;

/// OpenAI's name of a reason. A cancelled turn has stopped.
pub(super) const fn reason_word(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop | FinishReason::Abort => "stop",
        FinishReason::Length => "length",
    }
}

pub(super) fn push_head(out: &mut Vec<u8>, head: &Head, object: &str) {
    out.extend_from_slice(b"{\"id\":");
    push_string(out, &head.id);
    write_bytes(
        out,
        format_args!(
            ",\"object\":\"{object}\",\"created\":{},\"model\":",
            head.created
        ),
    );
    push_string(out, &head.model);
    for (name, value) in &head.envelope {
        out.push(b',');
        push_string(out, name);
        write_bytes(out, format_args!(":{value}"));
    }
    out.extend_from_slice(b",\"choices\":[");
}

/// Closes a chunk. It has the usage so far, or null if the usage comes in a chunk of its own.
pub(super) fn close_chunk(out: &mut Vec<u8>, head: &Head) {
    out.push(b']');
    close_object(out, head);
}

/// Closes an object after its list of choices, like [`close_chunk`].
pub(super) fn close_object(out: &mut Vec<u8>, head: &Head) {
    let Usage {
        prompt_tokens,
        completion_tokens,
        ..
    } = head.usage;
    match head.usage_chunks {
        UsageChunks::None => out.extend_from_slice(b"}\n\n"),
        UsageChunks::Last => out.extend_from_slice(b",\"usage\":null}\n\n"),
        UsageChunks::Every => write_bytes(
            out,
            format_args!(
                ",\"usage\":{{\"prompt_tokens\":{prompt_tokens},\"completion_tokens\":{completion_tokens},\
                 \"total_tokens\":{}}}}}\n\n",
                prompt_tokens + completion_tokens
            ),
        ),
    }
}

/// `reasoning`: number of generated tokens that were thoughts, if the answer may have thoughts.
pub(super) fn push_usage(out: &mut Vec<u8>, usage: &Usage, reasoning: Option<usize>) {
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
            "\"usage\":{{\"prompt_tokens\":{prompt_tokens},\"completion_tokens\":{completion_tokens},\
             \"total_tokens\":{total},\"prompt_tokens_details\":{{\"cached_tokens\":{cached_tokens}}}"
        ),
    );
    if let Some(tokens) = reasoning {
        let details =
            format_args!(",\"completion_tokens_details\":{{\"reasoning_tokens\":{tokens}}}");
        write_bytes(out, details);
    }
    out.push(b'}');
}

fn push_token(out: &mut Vec<u8>, id: Option<u32>, bytes: &[u8], logprob: f32) {
    out.extend_from_slice(b"{\"token\":");
    match id {
        Some(id) => push_id_as_text(out, id),
        None => push_string(out, &String::from_utf8_lossy(bytes)),
    }
    out.extend_from_slice(b",\"logprob\":");
    push_f32(out, logprob);
    write_bytes(out, format_args!(",\"bytes\":{bytes:?}"));
}

/// Writes tokens with their log-probabilities as a list without brackets. `as_ids`: tokens are named by their ids.
pub(super) fn push_tokens(out: &mut Vec<u8>, tokens: &[TokenLogprob], as_ids: bool) {
    let id = |token: u32| as_ids.then_some(token);
    for (at, token) in tokens.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        let logprob = token.logprob.unwrap_or_default();
        push_token(out, id(token.token), &token.bytes, logprob);
        out.extend_from_slice(b",\"top_logprobs\":[");
        for (at, other) in token.top.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            push_token(out, id(other.token), &other.bytes, other.logprob);
            out.push(b'}');
        }
        out.extend_from_slice(b"]}");
    }
}

pub(super) fn push_logprobs(out: &mut Vec<u8>, head: &Head, logprobs: &[TokenLogprob]) {
    if !head.logprobs {
        out.extend_from_slice(b"null");
        return;
    }
    out.extend_from_slice(b"{\"content\":[");
    push_tokens(out, logprobs, head.tokens_as_ids);
    out.extend_from_slice(b"],\"refusal\":null}");
}

pub(super) fn open_chunk(out: &mut Vec<u8>, head: &Head, index: usize) {
    out.extend_from_slice(b"data: ");
    push_head(out, head, "chat.completion.chunk");
    write_bytes(out, format_args!("{{\"index\":{index},\"delta\":{{"));
}

pub(super) fn end_stream(out: &mut Vec<u8>, head: &Head, object: &str, reasoning: Option<usize>) {
    if head.usage_chunks != UsageChunks::None {
        out.extend_from_slice(b"data: ");
        push_head(out, head, object);
        out.extend_from_slice(b"],");
        push_usage(out, &head.usage, reasoning);
        out.extend_from_slice(b"}\n\n");
    }
    out.extend_from_slice(b"data: [DONE]\n\n");
}

pub(super) fn error_chunk(out: &mut Vec<u8>, error: &Error) {
    let object = Value::Object(error.to_json());
    write_bytes(
        out,
        format_args!("data: {{\"error\":{object}}}\n\ndata: [DONE]\n\n"),
    );
}
