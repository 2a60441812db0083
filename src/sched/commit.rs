//! Records the outcome of a step.

use super::scheduler::Scheduler;
use super::sequence::{FinishReason, Sequence};
use crate::error::{Error, Result};

/// Takes the place of a token if the row's logits are not finite.
pub const NO_TOKEN: u32 = u32::MAX;

/// A sequence that ended; dropping it frees its blocks.
#[derive(Debug)]
pub struct Finished {
    /// The sequence with all its tokens.
    pub sequence: Box<Sequence>,
    /// Why it ended.
    pub reason: FinishReason,
}

/// Is called for each sampled token. If it returns a reason, the sequence ends.
pub trait StepTokens {
    /// `row` is the token's index among the step's sampled rows. With `reason`, the scheduler ends the sequence by itself.
    fn on_token(
        &mut self,
        id: u64,
        row: usize,
        token: u32,
        reason: Option<FinishReason>,
    ) -> Option<FinishReason>;

    /// Is called for a sequence with a row whose logits are not finite. The sequence ends without a further token.
    fn on_no_token(&mut self, _id: u64) {}

    /// Is called for each token of a scored prompt, in order, except the first one. `row` has its log-probability.
    fn on_prompt_token(&mut self, id: u64, row: usize, token: u32);
}

impl Scheduler {
    /// Records the outcome of the step planned last. `sampled` has one token per sampled row, or [`NO_TOKEN`]. Sequences that ended
    /// are appended to `finished`; those aborted since the plan are skipped.
    ///
    /// # Errors
    /// `internal_error` if the number of tokens is not the number of rows; nothing is recorded then.
    pub fn commit(
        &mut self,
        sampled: &[u32],
        events: &mut impl StepTokens,
        finished: &mut Vec<Finished>,
    ) -> Result<()> {
        if sampled.len() != self.step.num_rows() {
            let (rows, given) = (self.step.num_rows(), sampled.len());
            return Err(Error::internal(format!(
                "the step has {rows} sampled rows, but {given} tokens were given"
            )));
        }
        let (mut row, mut at) = (0, 0);
        let mut ended = false;
        for (scheduled, grant) in self.step.scheduled.iter().zip(&self.grants) {
            let first_row = row;
            let token_row = row + scheduled.prompt_rows;
            row = token_row + usize::from(scheduled.samples) + scheduled.drafts;
            // Both are in order of rank.
            let mut rest = self.running[at..].iter();
            let Some(skipped) = rest.position(|sequence| sequence.id() == scheduled.id) else {
                continue;
            };
            let sequence = &mut self.running[at + skipped];
            at += skipped + 1;
            // A generated token is charged once, when it is sampled.
            let prompt_left = sequence.new.prompt.len().saturating_sub(sequence.computed);
            let prompt_tokens = prompt_left.min(scheduled.new_tokens);
            let before = sequence.computed;
            let lost = sequence.lost.saturating_sub(before);
            self.stats.recomputed_tokens += lost.min(scheduled.new_tokens) as u64;
            sequence.computed += scheduled.new_tokens;
            let mut broken = sampled[first_row..token_row].contains(&NO_TOKEN);
            for row in (first_row..token_row).filter(|_| !broken) {
                let token = sequence.new.prompt[sequence.scored];
                events.on_prompt_token(scheduled.id, row, token);
                sequence.scored += 1;
            }
            let (tenant, mut output) = (sequence.new.tenant, 0);
            sequence.accepted = sequence.accepted.saturating_sub(scheduled.new_tokens);
            let mut reason = None;
            if scheduled.samples && !broken {
                for (at, &token) in sampled[token_row..row].iter().enumerate() {
                    if token == NO_TOKEN {
                        broken = true;
                        break;
                    }
                    let own = sequence.push(token);
                    sequence.note_guess(self.step.guesses.get(token_row + at).copied());
                    let told = events.on_token(scheduled.id, token_row + at, token, own);
                    reason = told.or(own);
                    output += 1;
                    if reason.is_some() || grant.drafts.get(at) != Some(&token) {
                        break;
                    }
                    // No state goes beyond a guess: what was right is computed again.
                    if sequence.table.has_state() {
                        sequence.accepted += 1;
                    } else {
                        sequence.computed += 1;
                    }
                }
                self.stats.sampled_tokens += output as u64;
                self.stats.drafted_tokens += scheduled.drafts as u64;
                let accepted = (output as u64).saturating_sub(1);
                self.stats.accepted_tokens += accepted;
                if grant.guessed {
                    self.stats.mtp_drafted_tokens += scheduled.drafts as u64;
                    self.stats.mtp_accepted_tokens += accepted;
                }
                if scheduled.drafts > 0 {
                    let kept = sequence.computed + sequence.accepted;
                    sequence.table.truncate(kept);
                }
            } else if !sequence.wants_sample() && sequence.remaining() == 0 {
                reason = Some(FinishReason::Length);
            }
            if broken {
                events.on_no_token(scheduled.id);
                // Nothing may continue from what was computed of it.
                sequence.table.forget();
                sequence.detach(&self.pool);
                reason = Some(FinishReason::Abort);
            } else {
                sequence.register(before);
            }
            self.policy.charge(tenant, prompt_tokens, output);
            sequence.finish = reason;
            ended |= reason.is_some();
        }
        if ended {
            self.collect_finished(finished);
        }
        self.step.clear();
        Ok(())
    }

    fn collect_finished(&mut self, finished: &mut Vec<Finished>) {
        let mut at = 0;
        while at < self.running.len() {
            if let Some(reason) = self.running[at].finish {
                let mut sequence = self.running.remove(at);
                self.forecast.note(&sequence, reason == FinishReason::Stop);
                sequence.leave_tail();
                if let Some(lower) = &mut self.lower {
                    lower.note_ended(&sequence.table);
                }
                self.policy.left(sequence.new.tenant);
                finished.push(Finished { sequence, reason });
            } else {
                at += 1;
            }
        }
    }
}
