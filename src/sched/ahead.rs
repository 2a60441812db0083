//! Plans a step while the one before it is being computed, as if every sequence of that one went on by a token. The token is not
//! known yet: the plan names the row that samples it, and the device reads it there. A sequence that turns out to have ended leaves
//! a row that is nobody's, which [`Scheduler::commit`] passes over.
//!
//! Nothing is recorded ahead: the outcome of a step is recorded as if the next one were not planned yet.

use super::grant::Grant;
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use super::step::{Scheduled, Step};

/// What a step that is being computed does for a sequence. It is known while the next step is planned, and empty at all other times.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct InFlight {
    /// Tokens of it that the step computes.
    pub(super) tokens: usize,
    /// The row that samples its next token, if the sequence may go on after that.
    row: Option<usize>,
}

/// The step planned ahead; empty if there is none.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    step: Step,
    grants: Vec<Grant>,
    /// A sequence got no block in such a plan. Only a plan that knows every outcome may take blocks from others.
    pub(super) is_short: bool,
}

impl Sequence {
    /// Its tokens that are computed once the step in flight is.
    pub(super) const fn reached(&self) -> usize {
        self.computed + self.in_flight.tokens
    }

    /// Its tokens once the step in flight is computed.
    pub(super) fn length(&self) -> usize {
        self.tokens.len() + usize::from(self.in_flight.row.is_some())
    }

    /// The token at `position` as a step gets it: -1 - r for the one that row r of the step in flight samples.
    pub(super) fn step_token(&self, position: usize) -> i32 {
        let row = self.in_flight.row.map_or(0, |row| row as i32);
        self.tokens
            .get(position)
            .map_or(-1 - row, |&token| token as i32)
    }

    /// Whether its next step cannot be planned before the outcome of the one in flight is known: a grammar's mask and penalties
    /// follow from the sampled token, and a scored prompt from what is recorded.
    const fn needs_outcome(&self, scheduled: &Scheduled) -> bool {
        let by_token = self.new.guided || self.seen.is_some();
        self.is_scoring() || (scheduled.samples && by_token)
    }
}

impl Scheduler {
    /// Plans the step after the one planned last, which is being computed. It becomes the step planned last when the outcome of that
    /// one is recorded, and is dropped if that one fails. Empty if there is nothing to compute, or if the outcome must be known first.
    ///
    /// No sequence is preempted for such a step. There is none for models with recurrent layers, with speculation, and with tiers below
    /// the model's memory.
    pub fn plan_ahead(&mut self) -> &Step {
        if self.may_go_ahead() {
            if self.note_in_flight() {
                self.swap_ahead();
                self.plan_step(true);
                self.swap_ahead();
                self.stats.steps_ahead += u64::from(!self.ahead.step.is_empty());
            }
            for sequence in &mut self.running {
                sequence.in_flight = InFlight::default();
            }
        }
        self.step_ahead()
    }

    /// The step planned ahead; empty if there is none.
    pub const fn step_ahead(&self) -> &Step {
        &self.ahead.step
    }

    /// The same, to add what it needs beside.
    pub(super) const fn step_ahead_mut(&mut self) -> &mut Step {
        &mut self.ahead.step
    }

    fn may_go_ahead(&self) -> bool {
        !self.step.is_empty()
            && self.ahead.step.is_empty()
            && !self.ahead.is_short
            && self.retries.is_empty()
            && self.speculation.is_none()
            && self.lower.is_none()
            && self.pool.states().is_none()
    }

    /// False if the outcome of the step in flight must be known first.
    fn note_in_flight(&mut self) -> bool {
        let (mut rows, mut at) = (0, 0);
        for scheduled in &self.step.scheduled {
            let row = rows + scheduled.prompt_rows;
            rows = row + usize::from(scheduled.samples);
            // Both are in order of rank.
            let mut rest = self.running[at..].iter();
            let Some(skipped) = rest.position(|sequence| sequence.id() == scheduled.id) else {
                continue;
            };
            let sequence = &mut self.running[at + skipped];
            at += skipped + 1;
            if sequence.needs_outcome(scheduled) {
                return false;
            }
            let ends = sequence.output().len() + 1 >= sequence.new.max_tokens;
            sequence.in_flight = InFlight {
                tokens: scheduled.new_tokens,
                row: (scheduled.samples && !ends).then_some(row),
            };
        }
        true
    }

    fn swap_ahead(&mut self) {
        std::mem::swap(&mut self.step, &mut self.ahead.step);
        std::mem::swap(&mut self.grants, &mut self.ahead.grants);
    }

    /// Takes the place of the step planned last, which has been recorded.
    pub(super) fn take_step_ahead(&mut self) {
        self.step.clear();
        self.grants.clear();
        self.swap_ahead();
    }

    /// Drops the step planned ahead: the one before it has failed.
    pub(super) fn drop_step_ahead(&mut self) {
        self.ahead.step.clear();
        self.ahead.grants.clear();
    }
}
