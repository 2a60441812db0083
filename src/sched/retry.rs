//! A step that fails is run again in halves, until a half of one sequence fails: that sequence is at fault and leaves, and its
//! neighbours get the tokens that they would have had without it.

use super::plan::Grant;
use super::scheduler::Scheduler;
use super::sequence::Sequence;

/// Sequences of a step that failed, each with the number of its tokens in that step.
#[derive(Debug)]
pub(super) struct Part(Vec<(u64, usize)>);

impl Scheduler {
    /// Books that the step planned last could not be computed. What it held is planned again in two halves before anything else is;
    /// of a step of one sequence, that sequence leaves without a token.
    pub fn fail_step(&mut self) -> Option<Box<Sequence>> {
        let tokens = |scheduled: &super::Scheduled| (scheduled.id, scheduled.new_tokens);
        let mut failed: Vec<(u64, usize)> = self.step.scheduled.iter().map(tokens).collect();
        self.step.clear();
        self.grants.clear();
        if let &[(id, _)] = failed.as_slice() {
            return self.abort(id);
        }
        for sequence in &mut self.running {
            // Drafts are not tried again, and what holds no token holds no block.
            sequence.table.truncate(sequence.tokens.len());
        }
        let second = failed.split_off(failed.len() / 2);
        self.retries.extend([Part(second), Part(failed)]);
        None
    }

    /// Plans a part of a step that failed; false if there is none.
    pub(super) fn plan_retry(&mut self) -> bool {
        while let Some(Part(failed)) = self.retries.pop() {
            let mut grants = Vec::with_capacity(self.running.len());
            for sequence in &self.running {
                let part = failed.iter().find(|&&(id, _)| id == sequence.id());
                grants.push(Grant {
                    tokens: part.map_or(0, |&(_, tokens)| tokens),
                    drafts: Vec::new(),
                });
            }
            self.fill_step(grants);
            if !self.step.is_empty() {
                return true;
            }
            // Those that it held were aborted meanwhile.
        }
        false
    }
}
