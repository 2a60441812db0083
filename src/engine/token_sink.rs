//! Converts the tokens of a step into text, as the scheduler records them.

use std::collections::HashMap;
use std::sync::Arc;

use super::choice::Choice;
use super::events::{Events, request_of};
use super::executor::StepOutput;
use super::guide::Failures;
use crate::error::{Error, Kind};
use crate::guided::StepMasks;
use crate::sched::{FinishReason, StepTokens};
use crate::text::Tokenizer;
use crate::wire::{Alternative, TokenLogprob};

/// Converts the tokens of a step into text, as the scheduler records them.
pub(super) struct TokenSink<'a, E> {
    pub(super) choices: &'a mut HashMap<u64, Choice>,
    pub(super) tokenizer: Option<&'a Tokenizer>,
    pub(super) output: &'a StepOutput,
    pub(super) masks: Option<Arc<StepMasks>>,
    pub(super) failures: &'a mut Failures,
    pub(super) events: &'a mut E,
}

impl<E: Events> StepTokens for TokenSink<'_, E> {
    fn on_token(
        &mut self,
        id: u64,
        row: usize,
        token: u32,
        reason: Option<FinishReason>,
    ) -> Option<FinishReason> {
        let choice = self.choices.get_mut(&id)?;
        choice.tokens += 1;
        let (request, index) = request_of(id);
        if choice.tokens == 1 {
            self.events.first_token(request, index);
        } else {
            self.events.next_token(request, index);
        }
        let mut complete = false;
        if let Some(guide) = choice
            .guide
            .as_ref()
            .filter(|_| reason != Some(FinishReason::Stop))
        {
            match guide.follow(token, row, self.masks.as_deref()) {
                Ok(done) => complete = done,
                Err(error) => {
                    self.failures.push((request_of(id).0, error));
                    return Some(FinishReason::Abort);
                }
            }
        }
        if choice.wants_ids {
            choice.delta.token_ids.push(token);
        }
        let tokenizer = self.tokenizer?;
        if choice.wants_logprobs
            && let Some(top) = self.output.top.get(row)
        {
            if let Some(logprobs) = &mut choice.logprobs {
                logprobs.push(self.output.logprobs[row]);
            }
            choice.delta.logprobs.push(token_logprob(
                tokenizer,
                token,
                Some(self.output.logprobs[row]),
                top,
            ));
        }
        let mut stopped = false;
        if reason != Some(FinishReason::Stop) {
            let flushed;
            let text = if choice.markers.contains(&token) {
                flushed = choice.detokenizer.flush(tokenizer) + marker(tokenizer, token);
                flushed.as_str()
            } else {
                choice.detokenizer.push(tokenizer, token)
            };
            if let Some(thoughts) = &mut choice.thoughts {
                thoughts.follow(text);
            }
            let matched = choice.matcher.push(text);
            choice.delta.text.push_str(&matched.emit);
            stopped = matched.stopped;
        }
        if stopped || complete {
            return Some(FinishReason::Stop);
        }
        if reason.is_none() && !(choice.delta.text.is_empty() && choice.delta.logprobs.is_empty()) {
            let mut delta = std::mem::take(&mut choice.delta);
            if let Some(lane) = &mut choice.lane {
                lane.say(&delta.text);
            }
            delta.tokens = choice.tokens;
            let (request, index) = request_of(id);
            self.events.delta(request, index, delta);
        }
        None
    }

    fn on_no_token(&mut self, id: u64) {
        let request = request_of(id).0;
        let tokens = self.choices.get(&id).map_or(0, |choice| choice.tokens);
        self.failures.push((request, no_numbers(tokens)));
    }

    fn on_prompt_token(&mut self, id: u64, row: usize, token: u32) {
        let (Some(choice), Some(tokenizer)) = (self.choices.get_mut(&id), self.tokenizer) else {
            return;
        };
        if let Some(top) = self.output.top.get(row) {
            let scored = token_logprob(tokenizer, token, Some(self.output.logprobs[row]), top);
            choice.scoring.push(&mut choice.delta, scored);
        }
    }
}

/// The error of an answer whose logits are not finite.
fn no_numbers(tokens: usize) -> Error {
    let message = format!(
        "the model's logits after {tokens} tokens of the answer are not finite: a weight is not a number, or \
         values overflow their type"
    );
    Error::new(Kind::Internal, "numerical_error", message)
}

/// The text of a special token, which the detokenizer leaves out.
fn marker(tokenizer: &Tokenizer, token: u32) -> &str {
    let bytes = tokenizer.token_bytes(token).unwrap_or_default();
    std::str::from_utf8(bytes).unwrap_or_default()
}

pub(super) fn token_logprob(
    tokenizer: &Tokenizer,
    token: u32,
    logprob: Option<f32>,
    top: &[(u32, f32)],
) -> TokenLogprob {
    let bytes = |id| tokenizer.token_bytes(id).unwrap_or_default().to_vec();
    let alternative = |&(token, logprob)| Alternative {
        token,
        bytes: bytes(token),
        logprob,
    };
    let top = top.iter().map(alternative).collect();
    TokenLogprob::new(token, bytes(token), logprob, top)
}
