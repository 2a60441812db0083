//! One request's reply: collects the choices' events and writes the route's wire form into the stream's mailbox.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::answer::AnswerFormat;
use super::blocks::Blocks;
use super::chat_answer::Answer;
use super::format::{Reads, Said, WireFormat, format_of};
use super::mailbox::Mailbox;
use crate::error::{Error, Kind, Result};
use crate::request::{CallForm, CallMember, Submission, UsageChunks};
use crate::sched::FinishReason;

/// Tokens of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Everything the model saw: history and input.
    pub prompt_tokens: usize,
    /// Of these, the session's history.
    pub history_tokens: usize,
    /// Of the prompt, what was not computed again.
    pub cached_tokens: usize,
    /// Generated.
    pub completion_tokens: usize,
}

/// A token with its log-probability and the most likely alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Its id.
    pub token: u32,
    /// The token's bytes; not always whole characters.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability; the first token of a prompt has none.
    pub logprob: Option<f32>,
    /// The most likely tokens, best first.
    pub top: Vec<Alternative>,
    /// Characters of the text that begin in it.
    pub chars: usize,
}

/// Characters that begin in `bytes`.
pub(super) fn chars(bytes: &[u8]) -> usize {
    const CONTINUATION: std::ops::RangeInclusive<u8> = 0x80..=0xbf;
    let begins = |byte: &&u8| !CONTINUATION.contains(*byte);
    bytes.iter().filter(begins).count()
}

impl TokenLogprob {
    /// A token that is in the text.
    pub fn new(token: u32, bytes: Vec<u8>, logprob: Option<f32>, top: Vec<Alternative>) -> Self {
        Self {
            token,
            chars: chars(&bytes),
            bytes,
            logprob,
            top,
        }
    }

    /// About what it takes on the wire.
    fn wire_bytes(&self) -> usize {
        const NUMBERS: usize = 48;
        let others = self.top.iter().map(|other| NUMBERS + other.bytes.len());
        NUMBERS + self.bytes.len() + others.sum::<usize>()
    }
}

/// A token that could have come in the place of another.
#[derive(Debug, Clone, PartialEq)]
pub struct Alternative {
    /// Its id.
    pub token: u32,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// What one step added to a choice.
#[derive(Debug, Default)]
pub struct Delta {
    /// New text; empty while characters or stop strings are incomplete.
    pub text: String,
    /// Generated tokens so far.
    pub tokens: usize,
    /// Log-probabilities of the new tokens, where asked for; those of an echoed prompt come first.
    pub logprobs: Vec<TokenLogprob>,
    /// Log-probabilities of the prompt's tokens, where they are reported by themselves.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// The stop string that ended it.
    pub stop_string: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Choice {
    /// All text (whole replies that are no list of parts), or nothing.
    pub(super) text: String,
    pub(super) tokens: usize,
    /// Not yet written (streams), or all (whole replies).
    pub(super) logprobs: Vec<TokenLogprob>,
    pub(super) prompt_logprobs: Vec<TokenLogprob>,
    /// Characters of the tokens that were written before `logprobs` (streams).
    pub(super) text_offset: usize,
    pub(super) finish: Option<FinishReason>,
    pub(super) stop_string: Option<String>,
    /// Text that waits to be written: for characters to be complete, or for a reader that is behind.
    waiting: String,
    /// About what it takes on the wire, with its log-probabilities (streams).
    waiting_bytes: usize,
    /// Where a chat's answer is taken apart.
    pub(super) answer: Option<Answer>,
    /// Where the reply is a list of parts: all text and its log-probabilities.
    pub(super) blocks: Blocks,
}

impl Choice {
    /// What the waiting text says; `last`: no more will come.
    fn read(&mut self, reads: Reads, last: bool) -> Said {
        let text = std::mem::take(&mut self.waiting);
        if reads == Reads::Blocks {
            let (blocks, tokens) = (&mut self.blocks, self.tokens);
            return Said::Changes(if last {
                blocks.finish(&text, &mut self.logprobs, tokens)
            } else {
                blocks.push(&text, &mut self.logprobs, tokens)
            });
        }
        match &mut self.answer {
            Some(answer) => Said::Pieces(answer.push(&text, self.tokens, last)),
            None => Said::Text(text),
        }
    }
}

/// What the frames of a reply share.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) model: String,
    pub(super) created: i64,
    pub(super) usage_chunks: UsageChunks,
    pub(super) logprobs: bool,
    pub(super) prompt_logprobs: bool,
    pub(super) first_choice: usize,
    /// So far.
    pub(super) usage: Usage,
    /// Events written so far.
    pub(super) events: usize,
    pub(super) envelope: Map<String, Value>,
    pub(super) call_forms: HashMap<String, CallForm>,
    pub(super) call_member: CallMember,
}

/// The reply of one request.
#[derive(Debug)]
pub struct Reply {
    format: &'static dyn WireFormat,
    stream: bool,
    head: Head,
    choices: Vec<Choice>,
    /// Of all choices.
    waiting_bytes: usize,
    mailbox: Arc<Mailbox>,
}

impl Reply {
    /// The reply to `submission`, into `mailbox`.
    ///
    /// # Errors
    /// `invalid_value` (400) for a route without a wire form.
    pub fn new(submission: &Submission, mailbox: Arc<Mailbox>) -> Result<Self> {
        Ok(Self {
            format: format_of(&submission.route)?,
            stream: submission.stream,
            head: Head {
                id: submission.reply_id.clone(),
                model: submission.model.clone(),
                created: submission.created,
                usage_chunks: submission.usage_chunks,
                logprobs: submission.sampling.logprobs.is_some(),
                prompt_logprobs: submission.prompt_logprobs.is_some(),
                first_choice: submission.first_choice as usize,
                usage: Usage::default(),
                events: 0,
                envelope: submission.envelope.clone(),
                call_forms: submission.call_forms.clone(),
                call_member: submission.call_member,
            },
            choices: (0..submission.n).map(|_| Choice::default()).collect(),
            waiting_bytes: 0,
            mailbox,
        })
    }

    /// The stream's mailbox.
    pub const fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// The answers are to be taken apart.
    pub fn expect(&mut self, format: &AnswerFormat) {
        for choice in &mut self.choices {
            match self.format.reads() {
                Reads::Text => {}
                Reads::Pieces => choice.answer = Answer::new(format),
                Reads::Blocks => choice.blocks = Blocks::new(format),
            }
        }
    }

    /// The request will run, on a prompt of so many tokens, of which some are its session's history.
    pub fn accept(&mut self, prompt_tokens: usize, history_tokens: usize) {
        self.head.usage.prompt_tokens = prompt_tokens;
        self.head.usage.history_tokens = history_tokens;
        let mut opening = Vec::new();
        if self.stream {
            let choices = self.choices.len();
            self.format.opening(&mut opening, &mut self.head, choices);
        }
        if opening.is_empty() {
            self.mailbox.accept();
        } else {
            self.mailbox.write(|out| out.append(&mut opening));
        }
    }

    /// Adds what one step generated for choice `index`. False: the reader is too far behind, so the stream has ended with an
    /// error, and the request is to be aborted.
    pub fn push(&mut self, index: usize, mut delta: Delta) -> bool {
        self.take(index, &mut delta);
        if self.stream {
            let (unread, limits) = (self.mailbox.unread(), self.mailbox.limits());
            let behind = unread + self.waiting_bytes;
            if unread > limits.merge_above && behind > limits.most {
                self.cut(behind);
                return false;
            }
            if unread > limits.merge_above {
                return true;
            }
        }
        self.advance(index);
        true
    }

    /// Takes the waiting text apart, and writes what a stream shows of it.
    fn advance(&mut self, index: usize) {
        let (format, head, choice) = (self.format, &mut self.head, &mut self.choices[index]);
        let said = choice.read(format.reads(), false);
        if !self.stream || said.is_empty() {
            return;
        }
        self.waiting_bytes -= std::mem::take(&mut choice.waiting_bytes);
        self.mailbox
            .write(|out| format.more(out, head, index, choice, &said));
        let written = choice.logprobs.drain(..);
        choice.text_offset += written.map(|token| token.chars).sum::<usize>();
    }

    /// Books a delta.
    fn take(&mut self, index: usize, delta: &mut Delta) {
        let choice = &mut self.choices[index];
        if self.stream {
            let logprobs = delta.logprobs.iter().map(TokenLogprob::wire_bytes);
            let bytes = delta.text.len() + logprobs.sum::<usize>();
            choice.waiting_bytes += bytes;
            self.waiting_bytes += bytes;
        } else if self.format.reads() != Reads::Blocks {
            choice.text.push_str(&delta.text);
        }
        choice.waiting.push_str(&delta.text);
        choice.tokens = delta.tokens;
        choice.logprobs.append(&mut delta.logprobs);
        choice.prompt_logprobs.append(&mut delta.prompt_logprobs);
        self.head.usage.completion_tokens = self.choices.iter().map(|choice| choice.tokens).sum();
    }

    /// Ends the stream of a reader that is too far behind.
    fn cut(&mut self, behind: usize) {
        let most = self.mailbox.limits().most;
        let message = format!(
            "a reader may be {most} bytes behind its stream, but this one is {behind}: the request was aborted"
        );
        let error = Error::new(Kind::Invalid, "reader_too_slow", message);
        for choice in &mut self.choices {
            *choice = Choice {
                tokens: choice.tokens,
                finish: choice.finish,
                ..Choice::default()
            };
        }
        self.waiting_bytes = 0;
        let (format, head, choices) = (self.format, &mut self.head, &self.choices);
        self.mailbox
            .cut(|out| format.error(out, head, choices, &error));
    }

    /// Whether the reply ends with the end of choice `index`: all others have ended.
    pub fn ends_with(&self, index: usize) -> bool {
        let mut others = self
            .choices
            .iter()
            .enumerate()
            .filter(|&(at, _)| at != index);
        others.all(|(_, choice)| choice.finish.is_some())
    }

    /// Ends choice `index` with its last text; the reply ends with its last choice, and then true is returned.
    pub fn finish(
        &mut self,
        index: usize,
        mut delta: Delta,
        reason: FinishReason,
        usage: Usage,
    ) -> bool {
        self.take(index, &mut delta);
        if index == 0 {
            // The other choices find the prompt computed.
            self.head.usage = Usage {
                completion_tokens: self.head.usage.completion_tokens,
                ..usage
            };
        }
        let (format, head, choice) = (self.format, &mut self.head, &mut self.choices[index]);
        choice.finish = Some(reason);
        choice.stop_string = delta.stop_string;
        self.waiting_bytes -= std::mem::take(&mut choice.waiting_bytes);
        let said = choice.read(format.reads(), true);
        if self.stream {
            self.mailbox
                .write(|out| format.last(out, head, index, choice, &said, reason));
        }
        let ended = self.choices.iter().all(|choice| choice.finish.is_some());
        if ended {
            self.end();
        }
        ended
    }

    fn end(&self) {
        let (format, head, choices) = (self.format, &self.head, &self.choices);
        self.mailbox.end(|out| {
            if self.stream {
                format.end(out, head, choices);
            } else {
                format.whole(out, head, choices);
            }
        });
    }

    /// Ends the reply with an error: the HTTP status where nothing was sent yet, else a last frame.
    pub fn fail(&mut self, error: Error) {
        let (format, head, choices) = (self.format, &mut self.head, &self.choices);
        self.mailbox.fail(error, !self.stream, |error, out| {
            format.error(out, head, choices, error);
        });
    }
}

impl Drop for Reply {
    /// A reply that is dropped before its end, by a panic, ends with an error: nobody waits for what will never come.
    fn drop(&mut self) {
        if self.mailbox.is_ended() {
            return;
        }
        let message = "the request was given up before its end by a fault of the server";
        self.fail(Error::internal(message));
        self.mailbox.signal();
    }
}
