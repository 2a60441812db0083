//! What becomes of requests, as the embedded scheduler's Python objects.

use std::collections::HashMap;

use pyo3::prelude::*;

use crate::engine::{Events, FinishedTurn};
use crate::error::Error;
use crate::sched::FinishReason;
use crate::wire::{Delta, Usage};

/// What one step, or the end of a request, did to one choice of a request.
#[pyclass(frozen, get_all, module = "lmserve._core")]
pub struct Event {
    request: u64,
    choice: usize,
    pub(super) token: Option<u32>,
    text: String,
    pub(super) tokens: usize,
    finish_reason: Option<&'static str>,
    usage: Option<TokenUsage>,
    error: Option<String>,
}

/// Tokens of one choice.
#[allow(clippy::struct_field_names)]
#[pyclass(frozen, get_all, module = "lmserve._core")]
#[derive(Clone, Copy)]
pub struct TokenUsage {
    prompt_tokens: usize,
    history_tokens: usize,
    cached_tokens: usize,
    completion_tokens: usize,
}

#[pymethods]
impl Event {
    fn __repr__(&self) -> String {
        let Self {
            request,
            choice,
            token,
            text,
            tokens,
            finish_reason,
            ..
        } = self;
        let reason =
            finish_reason.map_or_else(|| "None".to_owned(), |reason| format!("{reason:?}"));
        let token = token.map_or_else(|| "None".to_owned(), |token| token.to_string());
        format!(
            "Event(request={request}, choice={choice}, token={token}, text={text:?}, tokens={tokens}, \
             finish_reason={reason})"
        )
    }
}

/// Events in the order of the step's sequences, one for each choice.
pub(super) struct Collector {
    pub(super) events: Vec<Event>,
    at: HashMap<(u64, usize), usize>,
    now_ms: u64,
}

impl Collector {
    pub(super) fn new(now_ms: u64) -> Self {
        Self {
            events: Vec::new(),
            at: HashMap::new(),
            now_ms,
        }
    }

    /// The event of a choice; made if there is none yet.
    pub(super) fn of(&mut self, request: u64, choice: usize) -> &mut Event {
        let at = *self.at.entry((request, choice)).or_insert_with(|| {
            self.events.push(Event {
                request,
                choice,
                token: None,
                text: String::new(),
                tokens: 0,
                finish_reason: None,
                usage: None,
                error: None,
            });
            self.events.len() - 1
        });
        &mut self.events[at]
    }
}

impl Events for Collector {
    fn delta(&mut self, request: u64, choice: usize, delta: Delta) {
        let event = self.of(request, choice);
        event.text.push_str(&delta.text);
    }

    fn finish(
        &mut self,
        request: u64,
        choice: usize,
        delta: Delta,
        reason: FinishReason,
        usage: Usage,
        turn: Option<FinishedTurn>,
    ) {
        if let Some(turn) = turn {
            turn.commit(self.now_ms);
        }
        let event = self.of(request, choice);
        event.text.push_str(&delta.text);
        event.tokens = delta.tokens;
        event.finish_reason = Some(reason.as_str());
        event.usage = Some(TokenUsage {
            prompt_tokens: usage.prompt_tokens,
            history_tokens: usage.history_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
        });
    }

    fn fail(&mut self, request: u64, error: &Error, _: Usage) {
        let event = self.of(request, 0);
        event.finish_reason = Some("error");
        event.error = Some(error.message.clone());
    }
}
