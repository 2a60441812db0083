//! The wire form of `POST /v1/completions` (`OpenAI` API reference, "Completions"): SSE chunks, or one object.

use std::fmt::Write as _;

use super::choice::Choice;
use super::chunk::{close_chunk, end_stream, error_chunk, push_head, push_usage, reason_word};
use super::format::WireFormat;
use super::head::Head;
use super::json::{push_f32, push_string, write_bytes};
use super::prompt::push_prompt_logprobs;
use super::said::Said;
use super::token_ids::{push_id_as_text, push_prompt_ids, push_token_ids};
use crate::error::Error;
use crate::sched::FinishReason;

const OBJECT: &str = "text_completion";

/// Writes a token's text. A token with an incomplete character is written as OpenAI does, `bytes:\xe4`, so that different tokens
/// stay different.
fn push_text_of(out: &mut Vec<u8>, bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        push_string(out, text);
        return;
    }
    let mut text = String::from("bytes:");
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "\\x{byte:02x}");
    }
    push_string(out, &text);
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

fn push_logprobs(out: &mut Vec<u8>, head: &Head, choice: &Choice) {
    let tokens = &choice.logprobs;
    if !head.logprobs {
        out.extend_from_slice(b"null");
        return;
    }
    out.extend_from_slice(b"{\"tokens\":");
    let push = |out: &mut Vec<u8>, id: u32, bytes: &[u8]| {
        if head.tokens_as_ids {
            push_id_as_text(out, id);
        } else {
            push_text_of(out, bytes);
        }
    };
    push_list(out, tokens, |out, token| {
        push(out, token.token, &token.bytes);
    });
    out.extend_from_slice(b",\"token_logprobs\":");
    push_list(out, tokens, |out, token| match token.logprob {
        Some(logprob) => push_f32(out, logprob),
        None => out.extend_from_slice(b"null"),
    });
    out.extend_from_slice(b",\"top_logprobs\":");
    push_list(out, tokens, |out, token| {
        if token.logprob.is_none() {
            out.extend_from_slice(b"null");
            return;
        }
        out.push(b'{');
        for (at, other) in token.top.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            push(out, other.token, &other.bytes);
            out.push(b':');
            push_f32(out, other.logprob);
        }
        out.push(b'}');
    });
    let mut offset = choice.text_offset;
    out.extend_from_slice(b",\"text_offset\":");
    push_list(out, tokens, |out, token| {
        write_bytes(out, format_args!("{offset}"));
        offset += token.chars;
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
    let index = head.first_choice + index;
    write_bytes(out, format_args!("{{\"index\":{index},\"text\":"));
    push_string(out, text);
    out.extend_from_slice(b",\"logprobs\":");
    push_logprobs(out, head, choice);
    push_prompt_logprobs(out, head, choice);
    if !choice.begun {
        push_prompt_ids(out, head);
    }
    push_token_ids(out, head, choice);
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

/// `POST /v1/completions`.
#[derive(Debug)]
pub(super) struct Completions;

impl WireFormat for Completions {
    fn name(&self) -> &'static str {
        "completions"
    }

    fn more(&self, out: &mut Vec<u8>, head: &mut Head, index: usize, choice: &Choice, said: &Said) {
        push_chunk(out, head, index, said.text(), choice, None);
    }

    fn last(
        &self,
        out: &mut Vec<u8>,
        head: &mut Head,
        index: usize,
        choice: &Choice,
        said: &Said,
        reason: FinishReason,
    ) {
        push_chunk(out, head, index, said.text(), choice, Some(reason));
    }

    fn end(&self, out: &mut Vec<u8>, head: &Head, _: &[Choice]) {
        end_stream(out, head, OBJECT, None);
    }

    fn whole(&self, out: &mut Vec<u8>, head: &Head, choices: &[Choice]) {
        push_head(out, head, OBJECT);
        for (index, choice) in choices.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            push_choice(out, head, index, &choice.text, choice, choice.finish);
        }
        out.extend_from_slice(b"],");
        push_usage(out, &head.usage, None);
        out.push(b'}');
    }

    fn error(&self, out: &mut Vec<u8>, _: &mut Head, _: &[Choice], error: &Error) {
        error_chunk(out, error);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use crate::request::Submission;
    use crate::sched::FinishReason;
    use crate::wire::{Delta, Mailbox, Poll, Reply, TokenLogprob, Usage, Wake};

    fn delta(text: &str, tokens: &[&[u8]]) -> Delta {
        let logprobs = tokens
            .iter()
            .map(|bytes| TokenLogprob::new(7, bytes.to_vec(), Some(-0.5), Vec::new()));
        Delta {
            text: text.to_owned(),
            tokens: tokens.len(),
            logprobs: logprobs.collect(),
            ..Delta::default()
        }
    }

    fn logprobs(stream: bool) -> Vec<Value> {
        let submission = json!({
            "route": "completions",
            "stream": stream,
            "input": {"type": "text", "text": "x"},
            "sampling": {"logprobs": 0},
        });
        let submission = Submission::parse(submission.to_string().as_bytes()).unwrap();
        let mailbox = Mailbox::new(1, Arc::new(Wake::new().unwrap()));
        let mut reply = Reply::new(&submission, Arc::clone(&mailbox)).unwrap();
        reply.accept(1, 0);
        reply.push(0, delta("ab", &[b"ab"]));
        // Two tokens form one character. The first token's text must wait for the second.
        reply.push(0, delta("", &[b"\xc3"]));
        reply.push(0, delta("\u{e9}", &[b"\xa9"]));
        reply.finish(0, delta("c", &[b"c"]), FinishReason::Stop, Usage::default());
        let Poll::Ended(bytes) = mailbox.poll() else {
            panic!("the reply has ended");
        };
        let text = String::from_utf8(bytes).unwrap();
        text.split("\n\n")
            .map(|event| event.trim_start_matches("data: "))
            .filter_map(|event| serde_json::from_str::<Value>(event).ok())
            .map(|event| event["choices"][0]["logprobs"].clone())
            .collect()
    }

    #[test]
    fn offsets_go_on_from_chunk_to_chunk() {
        let whole = logprobs(false);
        assert_eq!(
            whole[0]["tokens"],
            json!(["ab", "bytes:\\xc3", "bytes:\\xa9", "c"])
        );
        assert_eq!(whole[0]["text_offset"], json!([0, 2, 3, 3]));
        for field in ["tokens", "text_offset"] {
            let joined: Vec<Value> = logprobs(true)
                .iter()
                .flat_map(|chunk| chunk[field].as_array().unwrap().clone())
                .collect();
            assert_eq!(Value::Array(joined), whole[0][field]);
        }
    }
}
