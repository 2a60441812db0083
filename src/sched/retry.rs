//! A failed step is run again in halves until a half of a single sequence fails. That sequence is at fault and leaves; the others
//! get the tokens that they would have got without it.
//!
//! If a model has recurrent layers, a failed step leaves states that are valid neither before nor after it. Its sequences lose what
//! they have, and compute it again in such halves, from the nearest snapshot on.

use super::grant::{Grant, Part, Plan};
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use super::transfers::Transfers;

impl Scheduler {
    /// Records that the step planned last could not be computed. Its sequences are planned again in two halves, before anything else.
    /// If the step had a single sequence, that sequence leaves without a token.
    pub fn fail_step(&mut self) -> Option<Box<Sequence>> {
        let scheduled: Vec<u64> = self.step.scheduled.iter().map(|s| s.id).collect();
        let failed = if self.pool.states().is_some() {
            self.lose_states()
        } else {
            let tokens = |scheduled: &super::Scheduled| (scheduled.id, scheduled.new_tokens);
            self.step.scheduled.iter().map(tokens).collect()
        };
        self.step.clear();
        self.grants.clear();
        if let &[id] = scheduled.as_slice() {
            return self.abort(id);
        }
        for sequence in &mut self.running {
            // Drafts are not tried again, and a sequence without tokens has no blocks.
            sequence.table.truncate(sequence.tokens.len());
        }
        self.retry_in_halves(failed);
        None
    }

    /// Records that the model has lost its memory, and with it the step planned last. Whatever runs waits again, and computes all of its
    /// tokens anew.
    pub fn lose_memory(&mut self) {
        self.step.clear();
        self.grants.clear();
        self.retries.clear();
        for mut sequence in std::mem::take(&mut self.running) {
            sequence.preemptions += 1;
            sequence.lost = sequence.lost.max(sequence.computed);
            sequence.detach(&self.pool);
            self.queue.push_preempted(sequence);
        }
        self.pool.forget_all();
        if let Some(lower) = &mut self.lower {
            lower.unsaved.clear();
            lower.transfers = Transfers::default();
        }
    }

    fn retry_in_halves(&mut self, mut failed: Vec<(u64, usize)>) {
        let second = failed.split_off(failed.len() / 2);
        self.retries.extend([Part(second), Part(failed)]);
    }

    /// Removes the sequences of the failed step from the batch; they wait as if they had been preempted. Returns them with the number of
    /// tokens that they would have had computed.
    fn lose_states(&mut self) -> Vec<(u64, usize)> {
        let mut lost = Vec::new();
        for scheduled in &self.step.scheduled {
            let running = self.running.iter().position(|s| s.id() == scheduled.id);
            let Some(at) = running else {
                continue;
            };
            let mut sequence = self.running.remove(at);
            lost.push((scheduled.id, sequence.computed + scheduled.new_tokens));
            sequence.preemptions += 1;
            sequence.lost = sequence.lost.max(sequence.computed);
            sequence.detach(&self.pool);
            self.queue.push_preempted(sequence);
        }
        // Of the part that the step was of, what it did not hold is still to be tried.
        if let Some(Part(rest)) = self.retries.last_mut() {
            rest.retain(|&(id, _)| lost.iter().all(|&(other, _)| other != id));
        }
        lost
    }

    /// Plans a part of a step that failed; false if there is none.
    pub(super) fn plan_retry(&mut self) -> bool {
        if self.pool.states().is_some() {
            return self.plan_lost();
        }
        while let Some(Part(failed)) = self.retries.pop() {
            let mut grants = Vec::with_capacity(self.running.len());
            for sequence in &self.running {
                let part = failed.iter().find(|&&(id, _)| id == sequence.id());
                grants.push(Grant {
                    tokens: part.map_or(0, |&(_, tokens)| tokens),
                    ..Grant::default()
                });
            }
            self.fill_step(grants);
            if !self.step.is_empty() {
                return true;
            }
            // Its sequences were aborted meanwhile.
        }
        false
    }

    /// Plans a step of only the sequences of a part of a failed step, until they have come as far as that step would have taken them.
    fn plan_lost(&mut self) -> bool {
        while let Some(Part(lost)) = self.retries.pop() {
            let behind = |sequence: &Sequence| {
                let goal = lost.iter().find(|&&(id, _)| id == sequence.id());
                goal.is_some_and(|&(_, goal)| sequence.computed < goal)
            };
            let waiting: Vec<u64> = self
                .queue
                .iter()
                .filter(|s| behind(s))
                .map(Sequence::id)
                .collect();
            let mut plan = Plan::new(&self.config, self.running.len());
            for id in waiting {
                self.admit_lost(id, &mut plan);
            }
            let mut at = 0;
            while at < self.running.len() {
                if behind(&self.running[at]) {
                    let remaining = self.running[at].remaining();
                    self.grant(&mut plan, at, remaining);
                }
                at += 1;
            }
            self.fill_step(plan.grants);
            if !self.step.is_empty() {
                self.retries.push(Part(lost));
                return true;
            }
            // All have come so far, were aborted, or have no room beside those that run.
        }
        false
    }
}
