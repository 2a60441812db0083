//! The wire form of `POST /v1/completions` (`OpenAI` API reference, "Completions"): SSE chunks, or one object.

use super::chat::{close_chunk, end_stream, push_head, push_usage, reason_word};
use super::json::{push_f32, push_string, write_bytes};
use super::reply::{Choice, Head, TokenLogprob, Usage};
use crate::sched::FinishReason;

const OBJECT: &str = "text_completion";

fn push_text_of(out: &mut Vec<u8>, bytes: &[u8]) {
    push_string(out, &String::from_utf8_lossy(bytes));
}

fn push_list<T>(out: &mut Vec<u8>, items: &[T], mut push: impl FnMut(&mut Vec<u8>, &T)) {
    out.push(b'[');
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        push(out, item);
    }
    out.push(b']');
}

fn push_logprobs(out: &mut Vec<u8>, head: &Head, tokens: &[TokenLogprob]) {
    if !head.logprobs {
        out.extend_from_slice(b"null");
        return;
    }
    out.extend_from_slice(b"{\"tokens\":");
    push_list(out, tokens, |out, token| push_text_of(out, &token.bytes));
    out.extend_from_slice(b",\"token_logprobs\":");
    push_list(out, tokens, |out, token| push_f32(out, token.logprob));
    out.extend_from_slice(b",\"top_logprobs\":");
    push_list(out, tokens, |out, token| {
        out.push(b'{');
        for (at, (bytes, logprob)) in token.top.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            push_text_of(out, bytes);
            out.push(b':');
            push_f32(out, *logprob);
        }
        out.push(b'}');
    });
    let mut offset = 0;
    out.extend_from_slice(b",\"text_offset\":");
    push_list(out, tokens, |out, token| {
        write_bytes(out, format_args!("{offset}"));
        offset += String::from_utf8_lossy(&token.bytes).chars().count();
    });
    out.push(b'}');
}

fn push_choice(
    out: &mut Vec<u8>,
    head: &Head,
    index: usize,
    text: &str,
    choice: &Choice,
    reason: Option<FinishReason>,
) {
    write_bytes(out, format_args!("{{\"index\":{index},\"text\":"));
    push_string(out, text);
    out.extend_from_slice(b",\"logprobs\":");
    push_logprobs(out, head, &choice.logprobs);
    match reason {
        Some(reason) => write_bytes(
            out,
            format_args!(",\"finish_reason\":\"{}\"}}", reason_word(reason)),
        ),
        None => out.extend_from_slice(b",\"finish_reason\":null}"),
    }
}

fn push_chunk(
    out: &mut Vec<u8>,
    head: &Head,
    index: usize,
    text: &str,
    choice: &Choice,
    reason: Option<FinishReason>,
) {
    out.extend_from_slice(b"data: ");
    push_head(out, head, OBJECT);
    push_choice(out, head, index, text, choice, reason);
    close_chunk(out, head);
}

pub(super) fn chunk(out: &mut Vec<u8>, head: &Head, index: usize, text: &str, choice: &Choice) {
    push_chunk(out, head, index, text, choice, None);
}

pub(super) fn last_chunk(
    out: &mut Vec<u8>,
    head: &Head,
    index: usize,
    text: &str,
    choice: &Choice,
    reason: FinishReason,
) {
    push_chunk(out, head, index, text, choice, Some(reason));
}

pub(super) fn end(out: &mut Vec<u8>, head: &Head, usage: &Usage) {
    end_stream(out, head, OBJECT, usage);
}

pub(super) fn whole(out: &mut Vec<u8>, head: &Head, choices: &[Choice], usage: &Usage) {
    push_head(out, head, OBJECT);
    for (index, choice) in choices.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        push_choice(out, head, index, &choice.text, choice, choice.finish);
    }
    out.extend_from_slice(b"],");
    push_usage(out, usage);
    out.push(b'}');
}
