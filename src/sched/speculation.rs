//! Speculative decoding: a step also computes tokens that a sequence may get next, and the sampled ones say which of them are right.
//! Each row is sampled as it would have been in a step of its own, so what comes out is the same.
//!
//! Where a model has recurrent layers, no state goes beyond a guess, since none could be taken out again: the guesses that were right
//! are computed again in the next step, in which the state goes beyond them.

use super::cost::Size;
use super::grant::Plan;
use super::scheduler::Scheduler;

/// Weighs tokens against time: a draft pays where it makes the step's tokens cheaper.
#[derive(Debug)]
struct DraftBudget {
    /// Tokens that the step should give.
    tokens: f64,
    /// Its time.
    time: f64,
    /// What a row adds to that.
    row: f64,
}

impl DraftBudget {
    /// Adds a token that comes with that probability, if it pays; `again`: if it comes, it is computed a second time.
    fn add(&mut self, probability: f32, again: bool) -> bool {
        let probability = f64::from(probability);
        let row = if again {
            self.row * (1.0 + probability)
        } else {
            self.row
        };
        let pays = probability * self.time > row * self.tokens;
        if pays {
            self.tokens += probability;
            self.time += row;
        }
        pays
    }
}

impl Scheduler {
    /// Tells how long the step planned last took to compute, before it is committed, so that later ones draft what pays.
    pub fn note_time(&mut self, seconds: f64) {
        let step = &self.step;
        // What each token of a prompt costs beside is not told apart.
        if step.num_tokens() == step.num_rows() && !step.is_empty() {
            let size = Size {
                rows: step.num_rows() as f64,
                context: step.context_lens.iter().map(|&n| f64::from(n)).sum(),
            };
            self.step_cost.note(size, seconds);
        }
    }

    /// Notes what a model that guesses ahead says of the step planned last, before it is committed: for each sampled row the token that
    /// may follow the row's. What comes next shows how often a sequence's guesses are right, drafted or not.
    pub fn note_guesses(&mut self, guesses: &[u32]) {
        self.step.guesses.clear();
        self.step.guesses.extend_from_slice(guesses);
    }

    /// Drafts for decoding sequences from what everyone else has left of the budget and of the `rows`. No block is taken from anybody.
    pub(super) fn grant_drafts(&mut self, plan: &mut Plan, mut rows: usize) {
        let Some(speculation) = self.speculation else {
            return;
        };
        let mut size = Size::default();
        for (sequence, grant) in self.running.iter().zip(&plan.grants) {
            if sequence.is_sampled(grant.tokens) {
                size.rows += 1.0;
                size.context += sequence.tokens.len() as f64;
            }
        }
        let (time, row) = self.step_cost.of(size);
        let mut draft_budget = DraftBudget {
            tokens: size.rows,
            time,
            row,
        };
        for (sequence, grant) in self.running.iter_mut().zip(&mut plan.grants) {
            let most = rows.min(plan.budget);
            if most > 0 && sequence.may_draft(grant.tokens) {
                let again = sequence.table.has_state();
                let pays = |probability| draft_budget.add(probability, again);
                (grant.drafts, grant.guessed) = sequence.draft(speculation.max_draft, most, pays);
                rows -= grant.drafts.len();
                plan.budget -= grant.drafts.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(sampled: usize, row_cost: f64) -> DraftBudget {
        let tokens = sampled as f64;
        DraftBudget {
            tokens,
            time: row_cost.mul_add(tokens, 1.0),
            row: row_cost,
        }
    }

    fn least(sampled: usize, row_cost: f64) -> f32 {
        let pays = |percent: &i32| budget(sampled, row_cost).add(*percent as f32 / 100.0, false);
        (0..=100)
            .find(pays)
            .map_or(f32::INFINITY, |p| p as f32 / 100.0)
    }

    #[test]
    fn a_fuller_batch_asks_for_more() {
        assert!(least(1, 0.2) < 0.2);
        assert!((0.5..0.7).contains(&least(8, 0.2)));
        assert!((0.8..1.0).contains(&least(32, 0.2)));
    }

    #[test]
    fn rows_that_cost_nothing_always_pay() {
        assert!(least(256, 1e-6) <= 0.01);
    }

    #[test]
    fn each_further_token_must_pay_by_itself() {
        // The best of (1 + 0.8 + 0.8^2 + ...) / (1 + 0.2 n).
        let ratio = |n: i32| (0..n).map(|i| 0.8_f32.powi(i)).sum::<f32>() / (1.0 + 0.2 * n as f32);
        let best = (1..100).max_by(|&a, &b| ratio(a).total_cmp(&ratio(b)));
        let mut budget = budget(1, 0.2);
        let added = (1..100)
            .take_while(|&i| budget.add(0.8_f32.powi(i), false))
            .count();
        assert_eq!(Some(1 + added as i32), best);
    }
}
