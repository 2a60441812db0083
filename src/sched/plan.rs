//! Plans the next step. Each pass decides which sequences get how many tokens; only [`Scheduler::grant`] finds the blocks for them.

use super::config::ENTRY_TOKENS;
use super::grant::{Grant, Plan};
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use super::step::Step;

/// A running sequence, by its index, and the tokens that it should get.
type Share = (usize, usize);

impl Scheduler {
    /// Decides what the next step computes. Decoding sequences come first. The oldest unfinished prompt gets three quarters of the
    /// rest, so that it is never starved. What is left admits newcomers and then goes to the shortest remaining prompt, so that a short
    /// prompt never waits for a long one. If another prompt is computing the next block of a prompt, that prompt waits for it. Drafts
    /// get what is left after all that. A failed step is tried again first, in parts.
    pub fn plan(&mut self) -> &Step {
        self.pool.note_loaded();
        self.take_fetched();
        if !self.plan_retry() {
            self.plan_step();
        }
        self.plan_transfers();
        &self.step
    }

    fn plan_step(&mut self) {
        self.adopt_prefixes();
        self.started.clear();
        let mut plan = Plan::new(&self.config, self.running.len());
        self.grant_decodes(&mut plan);
        if let Some((oldest, tokens)) = self.oldest_prompt(&plan) {
            self.grant(&mut plan, oldest, tokens);
        }
        while let Some(newcomer) = self.admit_next(&mut plan) {
            self.grant(&mut plan, newcomer, ENTRY_TOKENS);
        }
        while let Some((shortest, tokens)) = self.shortest_prompt(&plan) {
            if self.grant(&mut plan, shortest, tokens) == 0 {
                break;
            }
        }
        let rows = self.grant_scoring(&mut plan);
        self.grant_drafts(&mut plan, rows);
        self.fill_step(plan.grants);
    }

    /// For the prompts that are being computed, takes over the blocks that others have computed.
    fn adopt_prefixes(&mut self) {
        for sequence in &mut self.running {
            if sequence.is_prompt() {
                let adopted = sequence.adopt_prefix();
                if sequence.preemptions == 0 {
                    self.stats.cached_tokens += adopted as u64;
                }
            }
        }
    }

    fn grant_decodes(&mut self, plan: &mut Plan) {
        let mut at = 0;
        while at < self.running.len() {
            if self.running[at].is_decoding() {
                let tokens = self.running[at].remaining();
                self.grant(plan, at, tokens);
            }
            at += 1;
        }
    }

    fn oldest_prompt(&self, plan: &Plan) -> Option<Share> {
        let mut prompts = (0..self.running.len()).filter(|&at| self.running[at].is_prompt());
        let oldest = prompts.next()?;
        let alone = prompts.next().is_none()
            && (self.queue.len() == 0 || self.running.len() == self.config.max_batch);
        let others = if alone { 0 } else { plan.budget / 4 };
        Some((oldest, plan.budget - others))
    }

    /// Admits the next waiting sequence into the batch, if there is room for what it and the running ones will need. Returns its index.
    /// While there is no room, no other sequence overtakes it.
    fn admit_next(&mut self, plan: &mut Plan) -> Option<usize> {
        if plan.budget == 0 || self.running.len() == self.config.max_batch {
            return None;
        }
        let next = self.queue.peek_mut(&*self.policy)?;
        next.attach_prefix(&self.pool);
        let (running, pool) = (&self.running, &self.pool);
        let admitted = self.forecast.admits(next, running, pool, &self.config);
        if !admitted || !next.table.has_state_room() {
            next.detach(&self.pool);
            // A block that will only be copied may be the missing one, and nothing else will free a block.
            if !self.running.is_empty() || !next.table.has_state() {
                return None;
            }
        }
        let sequence = self.queue.pop(&*self.policy)?;
        Some(self.start(sequence, plan))
    }

    /// Admits the sequence with this id, which has run before, into the batch again, if it is waiting and there is room for it.
    pub(super) fn admit_lost(&mut self, id: u64, plan: &mut Plan) {
        let Some(mut sequence) = self.queue.remove(id) else {
            return;
        };
        sequence.attach_prefix(&self.pool);
        if self.running.len() < self.config.max_batch && sequence.has_room(self.running.len()) {
            self.start(sequence, plan);
        } else {
            sequence.detach(&self.pool);
            self.queue.push_preempted(sequence);
        }
    }

    /// Puts a sequence that holds its prefix into the batch. Returns its index.
    fn start(&mut self, mut sequence: Box<Sequence>, plan: &mut Plan) -> usize {
        self.restore(&mut sequence);
        sequence.attach_tail();
        if !sequence.has_run {
            sequence.has_run = true;
            self.started.push(sequence.id());
            sequence.cached = sequence.computed;
            self.stats.cached_tokens += sequence.computed as u64;
        }
        let rank = sequence.rank();
        let at = self.running.partition_point(|other| other.rank() < rank);
        self.running.insert(at, sequence);
        plan.grants.insert(at, Grant::default());
        at
    }

    fn shortest_prompt(&self, plan: &Plan) -> Option<Share> {
        let unfinished = |(at, sequence): (usize, &Sequence)| {
            let granted = plan.grants[at].tokens;
            let left = (sequence.remaining() - granted).min(sequence.free_tokens(granted));
            (left > 0 && !self.waits_for_prefix(plan, at)).then_some((at, left))
        };
        if plan.budget == 0 {
            return None;
        }
        let running = self.running().enumerate();
        running.filter_map(unfinished).min_by_key(|&(_, left)| left)
    }

    /// Distributes the rows that are left once each running sequence has one: a scored prompt needs a row per token. Returns the number
    /// of unused rows.
    fn grant_scoring(&mut self, plan: &mut Plan) -> usize {
        let most = self
            .speculation
            .map_or(0, |speculation| speculation.max_rows);
        let mut rows = self.config.max_batch.max(most) - self.running.len();
        let mut at = 0;
        while at < self.running.len() && rows > 0 {
            if self.running[at].is_scoring() {
                rows -= self.grant_rows(plan, at, rows);
            }
            at += 1;
        }
        rows
    }

    /// Gives the sequence at `at` up to `tokens` more tokens of the step, as far as they need no row besides its own. Returns how many
    /// it got.
    pub(super) fn grant(&mut self, plan: &mut Plan, at: usize, tokens: usize) -> usize {
        if self.waits_for_prefix(plan, at) {
            return 0;
        }
        let free = self.running[at].free_tokens(plan.grants[at].tokens);
        self.grant_rows(plan, at, tokens.min(free))
    }

    /// Whether the step computes the next block of the prompt at `at` for another sequence.
    fn waits_for_prefix(&self, plan: &Plan, at: usize) -> bool {
        let sequence = &self.running[at];
        let mut others = self.running.iter().zip(&plan.grants);
        sequence.is_prompt()
            && plan.grants[at].tokens == 0
            && others.any(|(other, grant)| grant.tokens > 0 && sequence.shares_next_block(other))
    }

    /// Like [`Self::grant`], but preempts the lowest ranks for blocks if necessary; `tokens` may each need a row.
    fn grant_rows(&mut self, plan: &mut Plan, at: usize, tokens: usize) -> usize {
        let (sequence, granted) = (&self.running[at], plan.grants[at].tokens);
        let tokens = tokens
            .min(sequence.remaining() - granted)
            .min(sequence.until_snapshot(granted))
            .min(plan.budget);
        if tokens == 0 {
            return 0;
        }
        let needed = sequence.computed + granted + tokens;
        while !self.running[at].table.grow(needed) {
            let last = self.running.len() - 1;
            self.preempt_last(plan);
            if last == at {
                return 0;
            }
        }
        plan.grants[at].tokens += tokens;
        plan.budget -= tokens;
        tokens
    }

    fn preempt_last(&mut self, plan: &mut Plan) {
        let (Some(mut victim), Some(grant)) = (self.running.pop(), plan.grants.pop()) else {
            return;
        };
        plan.budget += grant.tokens;
        victim.lost = victim.lost.max(victim.computed);
        if victim.table.has_state() {
            victim.leave_tail();
        }
        victim.detach(&self.pool);
        victim.preemptions += 1;
        self.stats.preemptions += 1;
        self.queue.push_preempted(victim);
    }

    /// Writes what each running sequence is granted into the step's arrays.
    pub(super) fn fill_step(&mut self, grants: Vec<Grant>) {
        self.step.clear();
        self.grants.clear();
        for (sequence, grant) in self.running.iter().zip(grants) {
            if grant.tokens > 0 {
                self.step.add(sequence, &grant);
                self.grants.push(grant);
            }
        }
        if !self.step.is_empty() {
            self.stats.steps += 1;
            self.stats.computed_tokens += self.step.num_tokens() as u64;
        }
    }
}
