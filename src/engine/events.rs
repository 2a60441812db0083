//! The events of requests, and the ids of their choices' sequences.

use super::turn_guard::FinishedTurn;
use crate::error::Error;
use crate::request::MAX_CHOICES;
use crate::sched::FinishReason;
use crate::wire::{Delta, Usage};

/// Receives the events of requests, choice by choice.
pub trait Events {
    /// A choice has new text (or log-probabilities).
    fn delta(&mut self, request: u64, choice: usize, delta: Delta);
    /// A choice has ended, with its last text. If it has a session's turn to keep, the turn must be committed before the client learns
    /// of the end.
    fn finish(
        &mut self,
        request: u64,
        choice: usize,
        delta: Delta,
        reason: FinishReason,
        usage: Usage,
        turn: Option<FinishedTurn>,
    );
    /// The whole request has failed. `usage`: what its unfinished choices have used until then.
    fn fail(&mut self, request: u64, error: &Error, usage: Usage);
    /// The first token of a choice was sampled.
    fn first_token(&mut self, _request: u64, _choice: usize) {}
    /// Another token of a choice was sampled.
    fn next_token(&mut self, _request: u64, _choice: usize) {}
}

/// How a request ends early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abort {
    /// The client has disconnected. The request's `on_disconnect` decides what happens to its turn.
    Disconnect,
    /// The turn was cancelled. The tokens generated so far are kept.
    Cancel,
}

/// The sequence id of a request's choice.
pub const fn sequence_id(request: u64, choice: usize) -> u64 {
    request * MAX_CHOICES as u64 + choice as u64
}

/// The request and the choice of a sequence.
pub const fn request_of(sequence: u64) -> (u64, usize) {
    (
        sequence / MAX_CHOICES as u64,
        (sequence % MAX_CHOICES as u64) as usize,
    )
}
