//! One request's reply: collects the choices' events and writes the route's wire form into the stream's mailbox.

use std::sync::Arc;

use super::mailbox::Mailbox;
use super::{chat, completions, generate};
use crate::error::Error;
use crate::request::{Route, Submission};
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
    /// The token's bytes; not always whole characters.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(Vec<u8>, f32)>,
}

/// What one step added to a choice.
#[derive(Debug, Default)]
pub struct Delta {
    /// New text; empty while characters or stop strings are incomplete.
    pub text: String,
    /// Generated tokens so far.
    pub tokens: usize,
    /// Log-probabilities of the new tokens, where asked for.
    pub logprobs: Vec<TokenLogprob>,
}

#[derive(Debug, Default)]
pub(super) struct Choice {
    /// All text (whole replies), or nothing (streams).
    pub(super) text: String,
    pub(super) tokens: usize,
    /// Not yet written (streams), or all (whole replies).
    pub(super) logprobs: Vec<TokenLogprob>,
    /// Characters of the tokens that were written before `logprobs` (streams).
    pub(super) text_offset: usize,
    pub(super) finish: Option<FinishReason>,
}

/// What every frame of a reply repeats.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) model: String,
    pub(super) created: i64,
    pub(super) include_usage: bool,
    pub(super) logprobs: bool,
}

/// The reply of one request.
#[derive(Debug)]
pub struct Reply {
    route: Route,
    stream: bool,
    head: Head,
    choices: Vec<Choice>,
    usage: Usage,
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
                include_usage: submission.include_usage,
                logprobs: submission.sampling.logprobs.is_some(),
            },
            choices: (0..submission.n).map(|_| Choice::default()).collect(),
            usage: Usage::default(),
            mailbox,
        }
    }

    /// The stream's mailbox.
    pub const fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// The request will run.
    pub fn accept(&self) {
        if !self.stream || self.route != Route::Chat {
            self.mailbox.accept();
            return;
        }
        self.mailbox.write(|out| {
            for index in 0..self.choices.len() {
                chat::opening_chunk(out, &self.head, index);
            }
        });
    }

    /// Adds what one step generated for choice `index`.
    pub fn push(&mut self, index: usize, delta: Delta) {
        let choice = &mut self.choices[index];
        choice.tokens = delta.tokens;
        choice.logprobs.extend(delta.logprobs);
        if !self.stream {
            choice.text.push_str(&delta.text);
        } else if !delta.text.is_empty() {
            self.mailbox.write(|out| match self.route {
                Route::Generate => generate::frame(out, &delta.text, choice.tokens),
                Route::Chat => chat::chunk(out, &self.head, index, &delta.text, choice),
                Route::Completions => {
                    completions::chunk(out, &self.head, index, &delta.text, choice);
                }
            });
            let written = choice.logprobs.drain(..);
            choice.text_offset += written
                .map(|token| completions::chars(&token.bytes))
                .sum::<usize>();
        }
    }

    /// Ends choice `index` with its last text; the reply ends with its last choice, and then true is returned.
    pub fn finish(
        &mut self,
        index: usize,
        delta: Delta,
        reason: FinishReason,
        usage: Usage,
    ) -> bool {
        let completion_tokens = self.usage.completion_tokens + usage.completion_tokens;
        self.usage = Usage {
            completion_tokens,
            ..usage
        };
        let choice = &mut self.choices[index];
        choice.tokens = delta.tokens;
        choice.finish = Some(reason);
        choice.logprobs.extend(delta.logprobs);
        if !self.stream {
            choice.text.push_str(&delta.text);
        }
        let ended = self.choices.iter().all(|choice| choice.finish.is_some());
        if self.stream {
            let choice = &self.choices[index];
            self.mailbox.write(|out| match self.route {
                Route::Generate => {
                    generate::last_frame(out, &delta.text, choice.tokens, reason, &self.usage);
                }
                Route::Chat => {
                    chat::last_chunk(out, &self.head, index, &delta.text, choice, reason);
                }
                Route::Completions => {
                    completions::last_chunk(out, &self.head, index, &delta.text, choice, reason);
                }
            });
        }
        if ended {
            self.end();
        }
        ended
    }

    fn end(&self) {
        let (head, choices, usage) = (&self.head, &self.choices, &self.usage);
        self.mailbox.end(|out| match (self.stream, self.route) {
            (true, Route::Generate) => {}
            (true, Route::Chat) => chat::end(out, head, usage),
            (true, Route::Completions) => completions::end(out, head, usage),
            (false, Route::Generate) => generate::whole(out, &choices[0], usage),
            (false, Route::Chat) => chat::whole(out, head, choices, usage),
            (false, Route::Completions) => completions::whole(out, head, choices, usage),
        });
    }

    /// Ends the reply with an error: the HTTP status where nothing was sent yet, else a last frame.
    pub fn fail(&self, error: Error) {
        self.mailbox
            .fail(error, !self.stream, |error, out| match self.route {
                Route::Generate => {
                    let tokens = self.choices.first().map_or(0, |choice| choice.tokens);
                    generate::error_frame(out, tokens, error, &self.usage);
                }
                Route::Chat | Route::Completions => chat::error_chunk(out, error),
            });
    }
}
