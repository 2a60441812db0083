//! One request's reply: collects the choices' events and writes the route's wire form into the stream's mailbox.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::answer::AnswerFormat;
use super::blocks::{Blocks, Change};
use super::chat_answer::{self, Answer};
use super::mailbox::Mailbox;
use super::{chat, completions, generate, interactive, messages, responses};
use crate::error::{Error, Kind};
use crate::request::{Route, Submission, UsageChunks};
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
}

/// The reply of one request.
#[derive(Debug)]
pub struct Reply {
    route: Route,
    stream: bool,
    head: Head,
    choices: Vec<Choice>,
    /// Of all choices.
    waiting_bytes: usize,
    mailbox: Arc<Mailbox>,
}

impl Reply {
    /// The reply to `submission`, into `mailbox`.
    pub fn new(submission: &Submission, mailbox: Arc<Mailbox>) -> Self {
        Self {
            route: submission.route,
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
            },
            choices: (0..submission.n).map(|_| Choice::default()).collect(),
            waiting_bytes: 0,
            mailbox,
        }
    }

    /// The stream's mailbox.
    pub const fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// The answers are to be taken apart.
    pub fn expect(&mut self, format: &AnswerFormat) {
        for choice in &mut self.choices {
            match self.route {
                Route::Chat => choice.answer = Answer::new(format),
                Route::Responses | Route::Messages => choice.blocks = Blocks::new(format),
                Route::Generate | Route::Completions | Route::Interactive => {}
            }
        }
    }

    /// The request will run, on a prompt of so many tokens, of which some are its session's history.
    pub fn accept(&mut self, prompt_tokens: usize, history_tokens: usize) {
        self.head.usage.prompt_tokens = prompt_tokens;
        self.head.usage.history_tokens = history_tokens;
        let head = &mut self.head;
        match self.route {
            Route::Chat if self.stream => self.mailbox.write(|out| {
                for index in 0..self.choices.len() {
                    chat::opening_chunk(out, head, index);
                }
            }),
            Route::Responses if self.stream => {
                self.mailbox.write(|out| responses::opening(out, head));
            }
            Route::Messages if self.stream => {
                self.mailbox.write(|out| messages::opening(out, head));
            }
            _ => self.mailbox.accept(),
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
        let (head, choice) = (&mut self.head, &mut self.choices[index]);
        let text = std::mem::take(&mut choice.waiting);
        if in_blocks(self.route) {
            let (blocks, tokens) = (&mut choice.blocks, choice.tokens);
            let changes = blocks.push(&text, &mut choice.logprobs, tokens);
            if self.stream && !changes.is_empty() {
                self.waiting_bytes -= std::mem::take(&mut choice.waiting_bytes);
                let out = |out: &mut Vec<u8>| write_blocks(out, self.route, head, choice, &changes);
                self.mailbox.write(out);
            }
            return;
        }
        let pieces = match &mut choice.answer {
            Some(answer) => answer.push(&text, choice.tokens, false),
            None => Vec::new(),
        };
        if !self.stream || text.is_empty() || (choice.answer.is_some() && pieces.is_empty()) {
            return;
        }
        self.waiting_bytes -= std::mem::take(&mut choice.waiting_bytes);
        self.mailbox.write(|out| match self.route {
            Route::Chat if choice.answer.is_some() => {
                chat_answer::chunks(out, head, index, &pieces, choice);
            }
            Route::Generate => generate::frame(out, &text, choice.tokens),
            Route::Chat => chat::chunk(out, head, index, &text, choice),
            Route::Completions => completions::chunk(out, head, index, &text, choice),
            Route::Responses | Route::Messages => {}
            Route::Interactive => interactive::line(out, &text, &head.usage),
        });
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
        } else if !in_blocks(self.route) {
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
        let (route, head, choices) = (self.route, &mut self.head, &self.choices);
        self.mailbox
            .cut(|out| write_error(out, route, head, choices, &error));
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
        let (head, choice) = (&mut self.head, &mut self.choices[index]);
        choice.finish = Some(reason);
        choice.stop_string = delta.stop_string;
        let mut text = std::mem::take(&mut choice.waiting);
        self.waiting_bytes -= std::mem::take(&mut choice.waiting_bytes);
        let mut pieces = Vec::new();
        if let Some(answer) = &mut choice.answer {
            pieces = answer.push(&text, choice.tokens, true);
            text.clear();
        }
        let text = text.as_str();
        let mut changes = Vec::new();
        if in_blocks(self.route) {
            let (blocks, tokens) = (&mut choice.blocks, choice.tokens);
            changes = blocks.finish(text, &mut choice.logprobs, tokens);
        }
        if self.stream {
            if !pieces.is_empty() {
                self.mailbox
                    .write(|out| chat_answer::chunks(out, head, index, &pieces, choice));
                choice.logprobs.clear();
            }
            self.mailbox.write(|out| match self.route {
                Route::Generate => {
                    generate::last_frame(out, text, choice.tokens, reason, &head.usage);
                }
                Route::Chat => chat::last_chunk(out, head, index, text, choice, reason),
                Route::Completions => {
                    completions::last_chunk(out, head, index, text, choice, reason);
                }
                Route::Responses | Route::Messages => {
                    write_blocks(out, self.route, head, choice, &changes);
                    if self.route == Route::Responses {
                        responses::last(out, head, &choice.blocks, reason);
                    } else {
                        messages::last(out, head, choice);
                    }
                }
                Route::Interactive => interactive::last_line(out, text, &head.usage, reason),
            });
        }
        let ended = self.choices.iter().all(|choice| choice.finish.is_some());
        if ended {
            self.end();
        }
        ended
    }

    fn end(&self) {
        let (head, choices) = (&self.head, &self.choices);
        self.mailbox.end(|out| match (self.stream, self.route) {
            (true, Route::Chat) => chat::end(out, head, choices),
            (true, Route::Completions) => completions::end(out, head),
            (true, _) => {}
            (false, Route::Generate) => generate::whole(out, &choices[0], &head.usage),
            (false, Route::Chat) => chat::whole(out, head, choices),
            (false, Route::Completions) => completions::whole(out, head, choices),
            (false, Route::Responses) => responses::whole(out, head, &choices[0]),
            (false, Route::Messages) => messages::whole(out, head, &choices[0]),
            (false, Route::Interactive) => interactive::whole(out, &choices[0], &head.usage),
        });
    }

    /// Ends the reply with an error: the HTTP status where nothing was sent yet, else a last frame.
    pub fn fail(&mut self, error: Error) {
        let (head, choices, route) = (&mut self.head, &self.choices, self.route);
        self.mailbox.fail(error, !self.stream, |error, out| {
            write_error(out, route, head, choices, error);
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

/// The frame of a stream that ends with an error.
fn write_error(
    out: &mut Vec<u8>,
    route: Route,
    head: &mut Head,
    choices: &[Choice],
    error: &Error,
) {
    match route {
        Route::Generate => generate::error_frame(out, choices[0].tokens, error, &head.usage),
        Route::Chat | Route::Completions => chat::error_chunk(out, error),
        Route::Responses => responses::failed(out, head, &choices[0], error),
        Route::Messages => messages::error_event(out, error),
        Route::Interactive => interactive::error_line(out, error, &head.usage),
    }
}

/// Whether replies are lists of parts.
const fn in_blocks(route: Route) -> bool {
    matches!(route, Route::Responses | Route::Messages)
}

fn write_blocks(
    out: &mut Vec<u8>,
    route: Route,
    head: &mut Head,
    choice: &Choice,
    changes: &[Change],
) {
    if route == Route::Responses {
        responses::changes(out, head, &choice.blocks, changes);
    } else {
        messages::changes(out, head, &choice.blocks, changes);
    }
}
