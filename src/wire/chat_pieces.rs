//! Writes chat answers with thoughts and calls, in chunks and in whole messages.

use std::borrow::Cow;

use super::answer::Piece;
use super::chat_answer::Answer;
use super::choice::Choice;
use super::chunk::{close_chunk, open_chunk, push_logprobs};
use super::custom::{custom_input, is_custom};
use super::head::Head;
use super::json::{push_string, write_bytes};
use super::token_ids::push_token_ids;
use crate::request::CallMember;

/// The kind of a call's tool.
#[derive(Clone, Copy)]
enum Kind {
    Function,
    Custom,
}

impl Kind {
    /// The kind of the tool with this name.
    fn of(head: &Head, name: &str) -> Self {
        if is_custom(head, name) {
            Self::Custom
        } else {
            Self::Function
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Function => "function",
            Self::Custom => "custom",
        }
    }

    /// The member that has the call's name and arguments.
    const fn member(self) -> &'static str {
        match self {
            Self::Function => "arguments",
            Self::Custom => "input",
        }
    }

    fn text(self, arguments: &str) -> Cow<'_, str> {
        match self {
            Self::Function => Cow::Borrowed(arguments),
            Self::Custom => custom_input(arguments),
        }
    }
}

/// Writes the members of a call after its id, and closes the call.
fn push_called(out: &mut Vec<u8>, head: &Head, name: &str, arguments: &str) {
    let kind = Kind::of(head, name);
    let word = kind.name();
    write_bytes(
        out,
        format_args!("\"type\":\"{word}\",\"{word}\":{{\"name\":"),
    );
    push_string(out, name);
    write_bytes(out, format_args!(",\"{}\":", kind.member()));
    push_string(out, &kind.text(arguments));
    out.extend_from_slice(b"}}");
}

/// Writes a chunk for each piece. The waiting log-probabilities and ids go with the first.
pub(super) fn chunks(
    out: &mut Vec<u8>,
    head: &Head,
    index: usize,
    pieces: &[Piece],
    choice: &Choice,
) {
    let Some(answer) = &choice.answer else { return };
    for (at, piece) in pieces.iter().enumerate() {
        open_chunk(out, head, index);
        match piece {
            Piece::Reasoning(text) => {
                out.extend_from_slice(b"\"reasoning_content\":");
                push_string(out, text);
            }
            Piece::Content(text) => {
                out.extend_from_slice(b"\"content\":");
                push_string(out, text);
            }
            Piece::Call { name, .. } if head.call_member == CallMember::FunctionCall => {
                out.extend_from_slice(b"\"function_call\":{\"name\":");
                push_string(out, name);
                out.extend_from_slice(b",\"arguments\":\"\"}");
            }
            Piece::Arguments { text, .. } if head.call_member == CallMember::FunctionCall => {
                out.extend_from_slice(b"\"function_call\":{\"arguments\":");
                push_string(out, text);
                out.push(b'}');
            }
            Piece::Call { index: call, name } => {
                write_bytes(
                    out,
                    format_args!("\"tool_calls\":[{{\"index\":{call},\"id\":"),
                );
                push_string(out, &answer.call_id(head, index, *call));
                out.push(b',');
                push_called(out, head, name, "");
                out.push(b']');
            }
            Piece::Arguments { index: call, text } => {
                let kind = Kind::of(head, &answer.calls[*call].0);
                write_bytes(
                    out,
                    format_args!(
                        "\"tool_calls\":[{{\"index\":{call},\"{}\":{{\"{}\":",
                        kind.name(),
                        kind.member()
                    ),
                );
                push_string(out, &kind.text(text));
                out.extend_from_slice(b"}}]");
            }
        }
        out.extend_from_slice(b"},\"logprobs\":");
        let logprobs = if at == 0 {
            choice.logprobs.as_slice()
        } else {
            &[]
        };
        push_logprobs(out, head, logprobs);
        if at == 0 {
            push_token_ids(out, head, choice);
        }
        out.extend_from_slice(b",\"finish_reason\":null}");
        close_chunk(out, head);
    }
}

/// Writes the content of a whole message, with its reasoning and calls.
pub(super) fn push_message(out: &mut Vec<u8>, head: &Head, index: usize, answer: &Answer) {
    if answer.content.is_empty() && answer.has_calls() {
        out.extend_from_slice(b"null");
    } else {
        push_string(out, &answer.content);
    }
    if !answer.reasoning.is_empty() {
        out.extend_from_slice(b",\"reasoning_content\":");
        push_string(out, &answer.reasoning);
    }
    if let Some((name, arguments)) = answer
        .calls
        .first()
        .filter(|_| head.call_member == CallMember::FunctionCall)
    {
        out.extend_from_slice(b",\"function_call\":{\"name\":");
        push_string(out, name);
        out.extend_from_slice(b",\"arguments\":");
        push_string(out, arguments);
        out.push(b'}');
    } else if answer.has_calls() {
        out.extend_from_slice(b",\"tool_calls\":[");
        for (call, (name, arguments)) in answer.calls.iter().enumerate() {
            if call > 0 {
                out.push(b',');
            }
            out.extend_from_slice(b"{\"id\":");
            push_string(out, &answer.call_id(head, index, call));
            out.push(b',');
            push_called(out, head, name, arguments);
        }
        out.push(b']');
    }
}
