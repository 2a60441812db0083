//! What a core tells of its requests, and how their choices are numbered as sequences.

use super::turn_guard::FinishedTurn;
use crate::error::Error;
use crate::request::MAX_CHOICES;
use crate::sched::FinishReason;
use crate::wire::{Delta, Usage};

/// What becomes of each request, choice by choice.
pub trait Events {
    /// A choice gained text (or log-probabilities).
    fn delta(&mut self, request: u64, choice: usize, delta: Delta);
    /// A choice ended, with its last text. Its session's turn, where it has one to keep, is to be committed before anybody
    /// hears of the end.
    fn finish(
        &mut self,
        request: u64,
        choice: usize,
        delta: Delta,
        reason: FinishReason,
        usage: Usage,
        turn: Option<FinishedTurn>,
    );
    /// The whole request failed. `usage`: what its choices that had not ended have used.
    fn fail(&mut self, request: u64, error: &Error, usage: Usage);
    /// A choice's first token was sampled.
    fn first_token(&mut self, _request: u64, _choice: usize) {}
    /// A choice's further token was sampled.
    fn next_token(&mut self, _request: u64, _choice: usize) {}
}

/// How a request ends before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abort {
    /// The client left; the request's `on_disconnect` decides about its turn.
    Disconnect,
    /// The turn was cancelled: what was generated is kept.
    Cancel,
}

/// The sequence of a request's choice in the steps.
pub const fn sequence_id(request: u64, choice: usize) -> u64 {
    request * MAX_CHOICES as u64 + choice as u64
}

/// The request and the choice that a sequence of a step belongs to.
pub const fn request_of(sequence: u64) -> (u64, usize) {
    (
        sequence / MAX_CHOICES as u64,
        (sequence % MAX_CHOICES as u64) as usize,
    )
}
