//! The wire form of `POST /v1/chat/completions` (`OpenAI` API reference, "Chat Completions"): SSE chunks, or one object.

use super::chat_answer::Answer;
use super::chat_pieces::{chunks, push_message};
use super::choice::Choice;
use super::chunk::{
    close_chunk, close_object, end_stream, error_chunk, open_chunk, push_head, push_logprobs,
    push_usage, reason_word,
};
use super::format::WireFormat;
use super::head::Head;
use super::json::{push_string, write_bytes};
use super::prompt::push_prompt_logprobs;
use super::said::{Reads, Said};
use super::token_ids::{push_prompt_ids, push_token_ids};
use crate::error::Error;
use crate::request::CallMember;
use crate::sched::FinishReason;

fn opening_chunk(out: &mut Vec<u8>, head: &Head, index: usize) {
    open_chunk(out, head, index);
    out.extend_from_slice(
        b"\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]",
    );
    if index == 0 {
        push_prompt_ids(out, head);
    }
    close_object(out, head);
}

fn chunk(out: &mut Vec<u8>, head: &Head, index: usize, text: &str, choice: &Choice) {
    open_chunk(out, head, index);
    out.extend_from_slice(b"\"content\":");
    push_string(out, text);
    out.extend_from_slice(b"},\"logprobs\":");
    push_logprobs(out, head, &choice.logprobs);
    push_token_ids(out, head, choice);
    out.extend_from_slice(b",\"finish_reason\":null}");
    close_chunk(out, head);
}

/// The finish reason. An answer that ends with calls waits for their results.
fn chat_word(head: &Head, choice: &Choice, reason: FinishReason) -> &'static str {
    match (&choice.answer, reason) {
        (Some(answer), FinishReason::Stop) if answer.has_calls() => match head.call_member {
            CallMember::ToolCalls => "tool_calls",
            CallMember::FunctionCall => "function_call",
        },
        _ => reason_word(reason),
    }
}

fn reasoning_tokens(choices: &[Choice]) -> Option<usize> {
    let of = |choice: &Choice| choice.answer.as_ref().and_then(Answer::reasoning_tokens);
    choices.iter().map(of).sum()
}

/// `POST /v1/chat/completions`.
#[derive(Debug)]
pub(super) struct Chat;

impl WireFormat for Chat {
    fn name(&self) -> &'static str {
        "chat"
    }

    fn reads(&self) -> Reads {
        Reads::Pieces
    }

    fn opening(&self, out: &mut Vec<u8>, head: &mut Head, choices: usize) {
        for index in 0..choices {
            opening_chunk(out, head, index);
        }
    }

    fn more(&self, out: &mut Vec<u8>, head: &mut Head, index: usize, choice: &Choice, said: &Said) {
        match said {
            Said::Pieces(pieces) => chunks(out, head, index, pieces, choice),
            _ => chunk(out, head, index, said.text(), choice),
        }
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
        if !said.pieces().is_empty() {
            chunks(out, head, index, said.pieces(), choice);
        } else if !said.text().is_empty()
            || !choice.logprobs.is_empty()
            || !choice.token_ids.is_empty()
        {
            chunk(out, head, index, said.text(), choice);
        }
        open_chunk(out, head, index);
        let word = chat_word(head, choice, reason);
        write_bytes(
            out,
            format_args!("}},\"logprobs\":null,\"finish_reason\":\"{word}\"}}"),
        );
        close_chunk(out, head);
    }

    fn end(&self, out: &mut Vec<u8>, head: &Head, choices: &[Choice]) {
        let reasoning = reasoning_tokens(choices);
        end_stream(out, head, "chat.completion.chunk", reasoning);
    }

    fn whole(&self, out: &mut Vec<u8>, head: &Head, choices: &[Choice]) {
        push_head(out, head, "chat.completion");
        for (index, choice) in choices.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            write_bytes(
                out,
                format_args!(
                    "{{\"index\":{index},\"message\":{{\"role\":\"assistant\",\"content\":"
                ),
            );
            match &choice.answer {
                None => push_string(out, &choice.text),
                Some(answer) => push_message(out, head, index, answer),
            }
            out.extend_from_slice(b",\"refusal\":null},\"logprobs\":");
            push_logprobs(out, head, &choice.logprobs);
            push_token_ids(out, head, choice);
            let word = chat_word(head, choice, choice.finish.unwrap_or(FinishReason::Stop));
            write_bytes(out, format_args!(",\"finish_reason\":\"{word}\"}}"));
        }
        out.push(b']');
        push_prompt_ids(out, head);
        push_prompt_logprobs(out, head, &choices[0]);
        out.push(b',');
        push_usage(out, &head.usage, reasoning_tokens(choices));
        out.push(b'}');
    }

    fn error(&self, out: &mut Vec<u8>, _: &mut Head, _: &[Choice], error: &Error) {
        error_chunk(out, error);
    }
}
