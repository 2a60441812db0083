//! Plans steps and books their outcome.

use std::sync::Arc;

use super::cost::StepCost;
use super::queue::Queue;
use super::sequence::{NewSequence, Sequence};
use super::speculation::Speculation;
use super::step::Step;
use crate::error::{Error, Kind, Result};
use crate::guided::StepMasks;
use crate::kv::BlockPool;

/// Tokens that a newly admitted sequence may compute in its first step even while a long prompt is being computed.
const ENTRY_TOKENS: usize = 16;

/// Sizes of the scheduler.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerConfig {
    /// Most sequences in a step.
    pub max_batch: usize,
    /// Most tokens in a step.
    pub max_batch_tokens: usize,
    /// Most tokens of a sequence, prompt and output.
    pub max_model_len: usize,
    /// Most sequences that wait.
    pub max_queue: usize,
}

/// Counters since the start, and the state now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Stats {
    pub running: usize,
    pub waiting: usize,
    pub steps: u64,
    pub computed_tokens: u64,
    pub sampled_tokens: u64,
    pub cached_tokens: u64,
    pub preemptions: u64,
    /// Tokens that were computed because they might come.
    pub drafted_tokens: u64,
    /// Of these, those that came.
    pub accepted_tokens: u64,
}

/// The scheduler. [`Self::plan`] and [`Self::commit`] alternate; everything else may be called in between.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: Arc<BlockPool>,
    pub(super) queue: Queue,
    /// In order of rank, so that the last one is the one to preempt. Boxed: sequences move between here and the queue.
    #[allow(clippy::vec_box)]
    pub(super) running: Vec<Box<Sequence>>,
    pub(super) speculation: Option<Speculation>,
    pub(super) step_cost: StepCost,
    pub(super) step: Step,
    /// Sequences that the step planned last computes for the first time.
    started: Vec<u64>,
    next_order: u64,
    pub(super) stats: Stats,
}

impl Scheduler {
    /// A scheduler over `pool`.
    ///
    /// # Errors
    /// `invalid_value` where a step could not hold all running sequences and still admit one.
    pub fn new(config: SchedulerConfig, pool: Arc<BlockPool>) -> Result<Self> {
        let least = config.max_batch + ENTRY_TOKENS;
        if config.max_batch == 0 || config.max_batch_tokens < least {
            let message = format!(
                "max_batch_tokens must be at least max_batch + {ENTRY_TOKENS} = {least}, but {} was given",
                config.max_batch_tokens
            );
            return Err(Error::invalid("max_batch_tokens", message));
        }
        let (queue, running) = (Queue::default(), Vec::with_capacity(config.max_batch));
        Ok(Self {
            config,
            pool,
            queue,
            running,
            speculation: None,
            step_cost: StepCost::new(0.0),
            step: Step::default(),
            started: Vec::new(),
            next_order: 0,
            stats: Stats::default(),
        })
    }

    /// The same, computing tokens ahead where that pays.
    #[must_use]
    pub fn with_speculation(mut self, speculation: Option<Speculation>) -> Self {
        let assumed = speculation.map_or(0.0, |speculation| speculation.row_cost);
        self.step_cost = StepCost::new(assumed);
        self.speculation = speculation;
        self
    }

    /// Most tokens, prompt and output, that a sequence can ever have here.
    pub fn max_tokens(&self) -> usize {
        self.config
            .max_model_len
            .min(self.pool.num_blocks() * self.pool.block_size())
    }

    /// The pool it schedules over.
    pub const fn pool(&self) -> &Arc<BlockPool> {
        &self.pool
    }

    /// Sets a tenant's share relative to the others' (1 is what a tenant has without this).
    ///
    /// # Errors
    /// `invalid_value` (400) for a weight of 0.
    pub fn set_weight(&mut self, tenant: u32, weight: u32) -> Result<()> {
        if weight == 0 {
            let message =
                format!("a weight must be at least 1, but 0 was given for tenant {tenant}");
            return Err(Error::invalid("weight", message));
        }
        self.queue.set_weight(tenant, weight);
        Ok(())
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// `queue_full` (429); `context_length_exceeded` (400) for one that could never run to its end.
    pub fn add(&mut self, new: NewSequence) -> Result<()> {
        if self.queue.len() >= self.config.max_queue {
            let message = format!(
                "the queue is full: {} requests wait, the limit",
                self.queue.len()
            );
            return Err(Error::new(Kind::Busy, "queue_full", message).with_detail("retry_after", 1));
        }
        let (total, limit) = (new.prompt.len() + new.max_tokens, self.max_tokens());
        if new.prompt.is_empty() || total > limit {
            let message = format!(
                "prompt and output must have 1 to {limit} tokens, but {} + {} were asked for",
                new.prompt.len(),
                new.max_tokens
            );
            return Err(Error::new(
                Kind::Invalid,
                "context_length_exceeded",
                message,
            ));
        }
        let order = self.next_order;
        self.next_order += 1;
        self.queue
            .push(Box::new(Sequence::new(new, &self.pool, order)));
        Ok(())
    }

    /// Whether nothing waits or runs.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.queue.len() == 0
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.queue.len(),
            ..self.stats
        }
    }

    /// Sequences in the batch.
    pub fn running(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().map(|sequence| &**sequence)
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> impl Iterator<Item = &Sequence> {
        self.queue.iter()
    }

    /// Sequences of which the step planned last computes something for the first time.
    pub fn started(&self) -> &[u64] {
        &self.started
    }

    /// The step planned last.
    pub const fn step(&self) -> &Step {
        &self.step
    }

    /// Adds the masks of the step planned last.
    pub fn set_masks(&mut self, masks: Arc<StepMasks>) {
        self.step.masks = Some(masks);
    }

    /// Decides what the next step computes. Decoding sequences come first; the oldest unfinished prompt gets three quarters of
    /// what is left, so that it is never starved; the rest admits newcomers and then goes to the shortest remaining prompt,
    /// so that a short one never waits behind a long one. A prompt whose next block another one computes waits for that. Drafts get
    /// what nobody else wants.
    pub fn plan(&mut self) -> &Step {
        for sequence in &mut self.running {
            sequence.granted = 0;
            sequence.drafts.clear();
            if sequence.remaining() > 1 {
                let adopted = sequence.adopt_prefix();
                if sequence.preemptions == 0 {
                    self.stats.cached_tokens += adopted as u64;
                }
            }
        }
        self.started.clear();
        let mut budget = self.config.max_batch_tokens;
        self.grant_decodes(&mut budget);
        self.grant_oldest_prompt(&mut budget);
        self.admit(&mut budget);
        self.grant_shortest_prompts(&mut budget);
        let rows = self.grant_scoring(&mut budget);
        self.grant_drafts(rows, budget);
        self.step.clear();
        for sequence in self.running.iter().filter(|sequence| sequence.granted > 0) {
            self.step.add(sequence, sequence.granted);
        }
        if !self.step.is_empty() {
            self.stats.steps += 1;
            self.stats.computed_tokens += self.step.num_tokens() as u64;
        }
        &self.step
    }

    fn grant_decodes(&mut self, budget: &mut usize) {
        let mut at = 0;
        while at < self.running.len() {
            if self.running[at].remaining() == 1 {
                self.grant(at, 1, budget);
            }
            at += 1;
        }
    }

    fn grant_oldest_prompt(&mut self, budget: &mut usize) {
        let mut prompts = (0..self.running.len()).filter(|&at| self.running[at].remaining() > 1);
        let Some(oldest) = prompts.next() else { return };
        let alone = prompts.next().is_none()
            && (self.queue.len() == 0 || self.running.len() == self.config.max_batch);
        let share = if alone {
            *budget
        } else {
            *budget - *budget / 4
        };
        self.grant(oldest, share, budget);
    }

    fn admit(&mut self, budget: &mut usize) {
        while *budget > 0 && self.running.len() < self.config.max_batch {
            // A block for each running sequence is left, or a newcomer would soon be preempted again.
            let headroom = self.running.len();
            let Some(next) = self.queue.peek_mut() else {
                return;
            };
            next.attach_prefix(&self.pool);
            if next.table.missing(next.tokens.len()) + headroom > self.pool.available() {
                next.detach(&self.pool);
                return;
            }
            let Some(mut sequence) = self.queue.pop() else {
                return;
            };
            sequence.attach_tail();
            if !sequence.has_run {
                sequence.has_run = true;
                self.started.push(sequence.id());
                sequence.cached = sequence.computed;
                self.stats.cached_tokens += sequence.computed as u64;
            }
            sequence.granted = 0;
            let at = self
                .running
                .partition_point(|other| other.rank() < sequence.rank());
            self.running.insert(at, sequence);
            self.grant(at, ENTRY_TOKENS, budget);
        }
    }

    fn grant_shortest_prompts(&mut self, budget: &mut usize) {
        while *budget > 0 {
            let unfinished = |sequence: &Sequence| {
                (sequence.remaining() - sequence.granted).min(free_tokens(sequence))
            };
            let open =
                self.running.iter().enumerate().filter(|&(at, sequence)| {
                    unfinished(sequence) > 0 && !self.waits_for_prefix(at)
                });
            let Some((at, left)) = open
                .map(|(at, s)| (at, unfinished(s)))
                .min_by_key(|&(_, left)| left)
            else {
                return;
            };
            if self.grant(at, left, budget) == 0 {
                return;
            }
        }
    }

    /// Shares out the rows that are left once each running sequence has one: a prompt that is scored needs a row for each token.
    /// Returns the rows that nobody took.
    fn grant_scoring(&mut self, budget: &mut usize) -> usize {
        let most = self
            .speculation
            .map_or(0, |speculation| speculation.max_rows);
        let mut rows = self.config.max_batch.max(most) - self.running.len();
        let mut at = 0;
        while at < self.running.len() && rows > 0 {
            if self.running[at].is_scoring() {
                rows -= self.grant_any(at, rows, budget);
            }
            at += 1;
        }
        rows
    }

    /// Gives the sequence at `at` up to `tokens` more tokens of this step, as far as they need no row beside its own.
    /// Returns how many it got.
    fn grant(&mut self, at: usize, tokens: usize, budget: &mut usize) -> usize {
        if self.waits_for_prefix(at) {
            return 0;
        }
        let free = free_tokens(&self.running[at]);
        self.grant_any(at, tokens.min(free), budget)
    }

    /// Whether this step computes, for another sequence, the block that comes next in the prompt of the one at `at`.
    fn waits_for_prefix(&self, at: usize) -> bool {
        let sequence = &self.running[at];
        sequence.remaining() > 1
            && sequence.granted == 0
            && self.running.iter().any(|other| sequence.waits_for(other))
    }

    /// As [`Self::grant`], taking blocks from the lowest ranks if it must; `tokens` may each need a row.
    fn grant_any(&mut self, at: usize, tokens: usize, budget: &mut usize) -> usize {
        let sequence = &self.running[at];
        let tokens = tokens
            .min(sequence.remaining() - sequence.granted)
            .min(*budget);
        if tokens == 0 {
            return 0;
        }
        let needed = sequence.computed + sequence.granted + tokens;
        while !self.running[at].table.grow(needed) {
            let last = self.running.len() - 1;
            self.preempt_last(budget);
            if last == at {
                return 0;
            }
        }
        self.running[at].granted += tokens;
        *budget -= tokens;
        tokens
    }

    fn preempt_last(&mut self, budget: &mut usize) {
        let Some(mut victim) = self.running.pop() else {
            return;
        };
        *budget += victim.granted;
        victim.granted = 0;
        victim.detach(&self.pool);
        victim.preemptions += 1;
        self.stats.preemptions += 1;
        self.queue.push_preempted(victim);
    }

    /// Gives up the step planned last, whose computation failed: its sequences leave, without a token.
    pub fn fail_step(&mut self) -> Vec<Box<Sequence>> {
        let failed: Vec<u64> = self
            .step
            .scheduled
            .iter()
            .map(|scheduled| scheduled.id)
            .collect();
        self.step.clear();
        failed.into_iter().filter_map(|id| self.abort(id)).collect()
    }

    /// Takes a sequence out, wherever it is; its blocks are free once it is dropped.
    pub fn abort(&mut self, id: u64) -> Option<Box<Sequence>> {
        if let Some(at) = self.running.iter().position(|sequence| sequence.id() == id) {
            let sequence = self.running.remove(at);
            sequence.leave_tail();
            self.queue.tenant_stopped(sequence.new.tenant);
            return Some(sequence);
        }
        self.queue.remove(id)
    }
}

/// Tokens that a sequence may still be granted in this step with one row: those before the prompt's scored part, and one more.
fn free_tokens(sequence: &Sequence) -> usize {
    if !sequence.is_scoring() {
        return usize::MAX;
    }
    let reached = sequence.computed + sequence.granted;
    (sequence.next_scoring_position() + 1).saturating_sub(reached)
}
