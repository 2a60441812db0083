//! One request's reply: collects the choices' events and writes the route's wire form into the stream's mailbox.

use std::sync::Arc;

use super::answer::AnswerFormat;
use super::blocks::Blocks;
use super::chat_answer::Answer;
use super::choice::Choice;
use super::delta::{Delta, TokenLogprob, Usage};
use super::format::WireFormat;
use super::head::Head;
use super::mailbox::Mailbox;
use super::routes::format_of;
use super::said::Reads;
use crate::error::{Error, Kind, Result};
use crate::request::Submission;
use crate::sched::FinishReason;

/// Approximate size of a token id on the wire, in bytes.
const ID_BYTES: usize = 7;

/// The reply of one request.
#[derive(Debug)]
pub struct Reply {
    format: &'static dyn WireFormat,
    stream: bool,
    head: Head,
    choices: Vec<Choice>,
    /// The sum over all choices.
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
                prompt_ids: None,
                tokens_as_ids: submission.token_ids.as_tokens,
                first_choice: submission.first_choice as usize,
                usage: Usage::default(),
                events: 0,
                envelope: submission.envelope.clone(),
                call_forms: submission.call_forms.clone(),
                call_member: submission.call_member,
                warnings: Vec::new(),
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

    /// Sets how the answers are parsed.
    pub fn expect(&mut self, format: &AnswerFormat) {
        for choice in &mut self.choices {
            match self.format.reads() {
                Reads::Text => {}
                Reads::Pieces => choice.answer = Answer::new(format),
                Reads::Blocks => choice.blocks = Blocks::new(format),
            }
        }
    }

    /// Adds a warning for the client, to be sent at the reply's end.
    pub fn warn(&mut self, warning: String) {
        self.head.warnings.push(warning);
    }

    /// Adds token ids to the reply, beginning with those of the prompt.
    pub fn tell_ids(&mut self, prompt: Vec<u32>) {
        self.head.prompt_ids = Some(prompt);
    }

    /// Accepts the request. `history_tokens` of its prompt tokens are its session's history.
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

    /// Adds what one step generated for choice `index`. Returns false if the reader is too far behind: the stream has ended with an
    /// error, and the request must be aborted.
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

    /// Parses the waiting text, and writes it to a stream.
    fn advance(&mut self, index: usize) {
        let (format, head, choice) = (self.format, &mut self.head, &mut self.choices[index]);
        let said = choice.read(head, format.reads(), false);
        if !self.stream || said.is_empty() {
            return;
        }
        self.waiting_bytes -= std::mem::take(&mut choice.waiting_bytes);
        self.mailbox
            .write(|out| format.more(out, head, index, choice, &said));
        choice.begun = true;
        choice.token_ids.clear();
        let written = choice.logprobs.drain(..);
        choice.text_offset += written.map(|token| token.chars).sum::<usize>();
    }

    /// Stores a delta.
    fn take(&mut self, index: usize, delta: &mut Delta) {
        let choice = &mut self.choices[index];
        if self.stream {
            let logprobs = delta.logprobs.iter().map(TokenLogprob::wire_bytes);
            let ids = ID_BYTES * delta.token_ids.len();
            let bytes = delta.text.len() + logprobs.sum::<usize>() + ids;
            choice.waiting_bytes += bytes;
            self.waiting_bytes += bytes;
        } else if self.format.reads() != Reads::Blocks {
            choice.text.push_str(&delta.text);
        }
        choice.waiting.push_str(&delta.text);
        choice.tokens = delta.tokens;
        choice.logprobs.append(&mut delta.logprobs);
        choice.token_ids.append(&mut delta.token_ids);
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

    /// Whether choice `index` is the last one that has not ended.
    pub fn ends_with(&self, index: usize) -> bool {
        let mut others = self
            .choices
            .iter()
            .enumerate()
            .filter(|&(at, _)| at != index);
        others.all(|(_, choice)| choice.finish.is_some())
    }

    /// Ends choice `index` with its last text. Returns true if this ends the reply.
    pub fn finish(
        &mut self,
        index: usize,
        mut delta: Delta,
        reason: FinishReason,
        usage: Usage,
    ) -> bool {
        self.take(index, &mut delta);
        if index == 0 {
            // The other choices share the computed prompt.
            self.head.usage = Usage {
                completion_tokens: self.head.usage.completion_tokens,
                ..usage
            };
        }
        let (format, head, choice) = (self.format, &mut self.head, &mut self.choices[index]);
        choice.finish = Some(reason);
        choice.stop_string = delta.stop_string;
        self.waiting_bytes -= std::mem::take(&mut choice.waiting_bytes);
        let said = choice.read(head, format.reads(), true);
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

    /// Ends the reply with an error: as the HTTP status if nothing was sent yet, otherwise as the last frame.
    pub fn fail(&mut self, error: Error) {
        let (format, head, choices) = (self.format, &mut self.head, &self.choices);
        self.mailbox.fail(error, !self.stream, |error, out| {
            format.error(out, head, choices, error);
        });
    }
}

impl Drop for Reply {
    /// If a panic drops the reply before its end, it ends with an error, so that the client does not wait forever.
    fn drop(&mut self) {
        if self.mailbox.is_ended() {
            return;
        }
        let message = "the server failed before the request ended";
        self.fail(Error::internal(message));
        self.mailbox.signal();
    }
}
