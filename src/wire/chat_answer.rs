//! Chat answers that are more than words: thoughts and calls, in chunks and in whole messages.

use super::answer::{AnswerFormat, AnswerParser, Piece, call_id};
use super::chat::{close_chunk, open_chunk, push_logprobs};
use super::json::{push_string, write_bytes};
use super::reply::{Choice, Head};
use crate::request::CallMember;

/// One choice's answer while it is taken apart.
#[derive(Debug)]
pub(super) struct Answer {
    parser: AnswerParser,
    /// Mistral's templates want short ids.
    short_ids: bool,
    /// Thoughts are looked for.
    may_think: bool,
    reasoning_tokens: usize,
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
}

impl Answer {
    pub(super) fn new(format: &AnswerFormat) -> Option<Self> {
        Some(Self {
            parser: AnswerParser::new(format)?,
            short_ids: format.short_ids(),
            may_think: format.thinking.is_some(),
            reasoning_tokens: 0,
            reasoning: String::new(),
            content: String::new(),
            calls: Vec::new(),
        })
    }

    /// What new text says; it is kept too. `tokens`: how many there are so far.
    pub(super) fn push(&mut self, text: &str, tokens: usize, last: bool) -> Vec<Piece> {
        let pieces = self.parser.push(text, last);
        if self.parser.thinks() {
            self.reasoning_tokens = tokens;
        }
        for piece in &pieces {
            match piece {
                Piece::Reasoning(text) => self.reasoning.push_str(text),
                Piece::Content(text) => self.content.push_str(text),
                Piece::Call { name, .. } => self.calls.push((name.clone(), String::new())),
                Piece::Arguments { index, text } => self.calls[*index].1.push_str(text),
            }
        }
        pieces
    }

    pub(super) const fn has_calls(&self) -> bool {
        !self.calls.is_empty()
    }

    /// Tokens of thoughts, their markers included; none where there are no thoughts to look for.
    pub(super) fn reasoning_tokens(&self) -> Option<usize> {
        self.may_think.then_some(self.reasoning_tokens)
    }

    fn call_id(&self, head: &Head, choice: usize, call: usize) -> String {
        call_id("call_", self.short_ids, &head.id, choice, call)
    }
}

/// A chunk for each piece; the log-probabilities that wait go with the first.
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
                out.extend_from_slice(b",\"type\":\"function\",\"function\":{\"name\":");
                push_string(out, name);
                out.extend_from_slice(b",\"arguments\":\"\"}}]");
            }
            Piece::Arguments { index: call, text } => {
                write_bytes(
                    out,
                    format_args!(
                        "\"tool_calls\":[{{\"index\":{call},\"function\":{{\"arguments\":"
                    ),
                );
                push_string(out, text);
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
        out.extend_from_slice(b",\"finish_reason\":null}");
        close_chunk(out, head);
    }
}

/// The content and what stands beside it in a whole message.
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
            out.extend_from_slice(b",\"type\":\"function\",\"function\":{\"name\":");
            push_string(out, name);
            out.extend_from_slice(b",\"arguments\":");
            push_string(out, arguments);
            out.extend_from_slice(b"}}");
        }
        out.push(b']');
    }
}
