//! The scheduler's state, and what may be done to it between steps: sequences come, leave and are looked at.

use std::sync::Arc;

use super::config::{ENTRY_TOKENS, SchedulerConfig, Speculation};
use super::cost::StepCost;
use super::forecast::Forecast;
use super::grant::{Grant, Part};
use super::lower::Lower;
use super::policy::{Policy, PolicyKind};
use super::queue::Queue;
use super::sequence::{NewSequence, Sequence};
use super::step::Step;
use crate::error::{Error, Kind, Result};
use crate::guided::StepMasks;
use crate::kv::BlockPool;

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
    /// Tokens that were computed again after a preemption.
    pub recomputed_tokens: u64,
    /// Tokens that were computed because they might come.
    pub drafted_tokens: u64,
    /// Of these, those that came.
    pub accepted_tokens: u64,
    /// Of the drafted tokens, those that a head of the model guessed (MTP).
    pub mtp_drafted_tokens: u64,
    /// Of these, those that came.
    pub mtp_accepted_tokens: u64,
}

/// The scheduler. [`Self::plan`] and [`Self::commit`] alternate; everything else may be called in between.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) config: SchedulerConfig,
    pub(super) pool: Arc<BlockPool>,
    pub(super) policy: Box<dyn Policy>,
    pub(super) queue: Queue,
    pub(super) forecast: Forecast,
    /// In order of rank, so that the last one is the one to preempt. Boxed: sequences move between here and the queue.
    #[allow(clippy::vec_box)]
    pub(super) running: Vec<Box<Sequence>>,
    pub(super) speculation: Option<Speculation>,
    pub(super) step_cost: StepCost,
    pub(super) step: Step,
    /// What the step planned last grants to each of its sequences, in the step's order.
    pub(super) grants: Vec<Grant>,
    /// Parts of a step that failed, to be tried by themselves; the last is next.
    pub(super) retries: Vec<Part>,
    /// Sequences that the step planned last computes for the first time, whether it is tried whole or in parts.
    pub(super) started: Vec<u64>,
    /// Where there are tiers below the model's memory.
    pub(super) lower: Option<Box<Lower>>,
    next_order: u64,
    pub(super) stats: Stats,
}

impl Scheduler {
    /// A scheduler over `pool`.
    ///
    /// # Errors
    /// `invalid_value` where a step could not hold all running sequences and still admit one, or the pool has too few window blocks
    /// for one sequence.
    pub fn new(config: SchedulerConfig, pool: Arc<BlockPool>) -> Result<Self> {
        let least = config.max_batch + ENTRY_TOKENS;
        if config.max_batch == 0 || config.max_batch_tokens < least {
            let message = format!(
                "max_batch_tokens must be at least max_batch + {ENTRY_TOKENS} = {least}, but {} was given",
                config.max_batch_tokens
            );
            return Err(Error::invalid("max_batch_tokens", message));
        }
        let least = pool.least_window_blocks(config.max_batch_tokens);
        let windows = pool.window_references().len();
        if windows < least {
            let message = format!(
                "num_window_blocks must be at least {least} for one sequence, but {windows} was given"
            );
            return Err(Error::invalid("num_window_blocks", message));
        }
        let (queue, running) = (Queue::default(), Vec::with_capacity(config.max_batch));
        Ok(Self {
            config,
            pool,
            policy: PolicyKind::default().policy(),
            queue,
            forecast: Forecast::default(),
            running,
            speculation: None,
            step_cost: StepCost::new(0.0),
            step: Step::default(),
            grants: Vec::new(),
            retries: Vec::new(),
            started: Vec::new(),
            lower: None,
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

    /// The same with another order of sequences, before the first one comes.
    #[must_use]
    pub fn with_policy(mut self, policy: Box<dyn Policy>) -> Self {
        self.policy = policy;
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
        self.policy.set_weight(tenant, weight);
        Ok(())
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// `queue_full` (429); `context_length_exceeded` (400) for one that could never run to its end.
    pub fn add(&mut self, new: NewSequence) -> Result<()> {
        let waiting = self.queue.len() + self.fetching();
        if waiting >= self.config.max_queue {
            let message =
                format!("the queue is full: {waiting} requests are waiting, which is the limit");
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
        let (level, line) = (self.policy.level(&new), self.policy.line(&new));
        self.policy.arrived(new.tenant);
        let sequence = Sequence::new(new, &self.pool, (level, order));
        self.enqueue(Box::new(sequence), line);
        Ok(())
    }

    /// Whether the step planned last computes a sequence whose state it changes in place. The state is unknown if the step fails.
    fn is_computed(&self, sequence: &Sequence) -> bool {
        let mut scheduled = self.step.scheduled.iter();
        sequence.table.has_state() && scheduled.any(|scheduled| scheduled.id == sequence.id())
    }

    /// Whether nothing waits or runs.
    pub fn is_idle(&self) -> bool {
        self.is_still() && self.fetching() == 0
    }

    /// Whether nothing can be computed until something else happens.
    pub fn is_still(&self) -> bool {
        self.running.is_empty() && self.queue.len() == 0
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.queue.len() + self.fetching(),
            ..self.stats
        }
    }

    /// Sequences in the batch.
    pub fn running(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().map(|sequence| &**sequence)
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> impl Iterator<Item = &Sequence> {
        let fetching = self.lower.iter().flat_map(|lower| lower.sequences());
        self.queue.iter().chain(fetching)
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

    /// Takes a sequence out, wherever it is; its blocks are free once it is dropped.
    pub fn abort(&mut self, id: u64) -> Option<Box<Sequence>> {
        let running = self.running.iter().position(|sequence| sequence.id() == id);
        let sequence = if let Some(at) = running {
            let mut sequence = self.running.remove(at);
            self.forecast.note(&sequence, false);
            if !self.is_computed(&sequence) {
                sequence.leave_tail();
                if let Some(lower) = &mut self.lower {
                    lower.note_ended(&sequence.table);
                }
            }
            sequence
        } else {
            let lower = self.lower.as_mut();
            let fetching = lower.and_then(|lower| lower.remove(id));
            fetching.or_else(|| self.queue.remove(id))?
        };
        self.policy.left(sequence.new.tenant);
        Some(sequence)
    }
}
