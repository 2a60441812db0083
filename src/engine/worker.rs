//! The engine's thread: drain the inbox, plan, compute, commit, publish; wake the readers once per step.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::admission::Admission;
use super::clock::now_ms;
use super::config::Stats;
use super::core::Core;
use super::embed::{EmbedJob, Embedded};
use super::events::{Abort, Events, request_of};
use super::executor::{Executor, MEMORY_LOST, StepOutput, WORKER_UNAVAILABLE};
use super::health::engine_down;
use super::inbox::{Command, ReadyRequest, Request};
use super::locks::lock;
use super::log_writer::{Done, LogSender};
use super::masking::MaskingThreads;
use super::metrics::Outcome;
use super::shared::Shared;
use super::turn_guard::FinishedTurn;
use crate::error::{Error, Result};
use crate::kv::StatePool;
use crate::panics::contain;
use crate::sched::{FinishReason, Transfers};
use crate::tier::Payload;
use crate::wire::{Delta, Reply, Usage};

/// The replies of the requests that the core knows.
#[derive(Debug)]
struct Replies {
    shared: Arc<Shared>,
    open: HashMap<u64, (Reply, Admission)>,
    /// Writes finished turns before their replies end.
    log: Option<LogSender>,
}

impl Events for Replies {
    fn delta(&mut self, request: u64, choice: usize, delta: Delta) {
        if let Some((reply, _)) = self.open.get_mut(&request)
            && !reply.push(choice, delta)
        {
            self.shared.abort(request, Abort::Disconnect);
        }
    }

    fn finish(
        &mut self,
        request: u64,
        choice: usize,
        delta: Delta,
        reason: FinishReason,
        usage: Usage,
        turn: Option<FinishedTurn>,
    ) {
        if let Some((_, open)) = self.open.get_mut(&request) {
            open.count(choice, usage);
        }
        if let Some(mut turn) = turn {
            if let Some((_, open)) = self.open.get(&request) {
                turn.commit.usage.time_ms = open.age().as_millis() as u64;
            }
            if let Some(log) = &self.log
                && let Some((mut reply, open)) = self.open.remove(&request)
            {
                // A session's request has one choice, and ends with it.
                let shared = Arc::clone(&self.shared);
                let done = Done::new(move |written: Result<()>| {
                    let outcome = written.as_ref().map_or(Outcome::Error, |()| reason.into());
                    shared.admissions.latencies().end(open.age(), outcome);
                    drop(open);
                    match written {
                        Ok(()) => drop(reply.finish(choice, delta, reason, usage)),
                        Err(error) => reply.fail(error),
                    }
                });
                return log.send(turn, done);
            }
            turn.commit(now_ms());
        }
        let Some((reply, _)) = self.open.get_mut(&request) else {
            return;
        };
        if !reply.ends_with(choice) {
            reply.finish(choice, delta, reason, usage);
        } else if let Some((mut reply, open)) = self.open.remove(&request) {
            self.shared
                .admissions
                .latencies()
                .end(open.age(), reason.into());
            // What it took of its tenant's allowance is free again before its client hears of the end.
            drop(open);
            reply.finish(choice, delta, reason, usage);
        }
    }

    fn fail(&mut self, request: u64, error: &Error, usage: Usage) {
        if let Some((mut reply, mut open)) = self.open.remove(&request) {
            open.count(0, usage);
            self.shared
                .admissions
                .latencies()
                .end(open.age(), Outcome::Error);
            drop(open);
            reply.fail(error.clone());
        }
    }

    fn first_token(&mut self, request: u64, choice: usize) {
        if choice == 0
            && let Some((_, open)) = self.open.get_mut(&request)
        {
            open.sampled();
            self.shared.admissions.latencies().first_token(open.age());
        }
    }

    fn next_token(&mut self, request: u64, choice: usize) {
        if choice == 0
            && let Some((_, open)) = self.open.get_mut(&request)
            && let Some(time) = open.sampled()
        {
            self.shared.admissions.latencies().next_token(time);
        }
    }
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    core: Core,
    executor: Box<dyn Executor + Send>,
    masking: MaskingThreads,
    replies: Replies,
    embeds: VecDeque<Box<EmbedJob>>,
    output: StepOutput,
    max_batch_tokens: usize,
    failed_steps: u64,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        core: Core,
        executor: Box<dyn Executor + Send>,
        max_batch_tokens: usize,
        log: Option<LogSender>,
    ) -> Result<Self> {
        let replies = Replies {
            shared: Arc::clone(&shared),
            open: HashMap::new(),
            log,
        };
        let worker = Self {
            shared,
            core,
            executor,
            masking: MaskingThreads::start()?,
            replies,
            embeds: VecDeque::new(),
            output: StepOutput::default(),
            max_batch_tokens,
            failed_steps: 0,
        };
        // A dashboard looks before the first request comes.
        worker.publish_stats();
        Ok(worker)
    }

    /// Runs until it is stopped. A panic takes the engine down, and every open request gets an error.
    pub(super) fn run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| while self.turn() {}));
        let why = match outcome {
            Ok(()) => "the server is shutting down",
            Err(_) => "its thread panicked",
        };
        let error = engine_down(why);
        self.shared.health.set_down(why);
        self.core.fail_all(&error, &mut self.replies);
        for job in self.embeds.drain(..) {
            job.fail(error.clone());
        }
        for command in self.shared.inbox.close() {
            command.reject(&error);
        }
        self.flush();
        self.publish_stats();
        self.shared.wake.signal();
    }

    /// Copies what is left of the sequences that have ended, for whoever starts after this one.
    fn flush(&mut self) {
        while self.core.scheduler().has_unsaved() {
            self.core.scheduler_mut().plan_transfers();
            self.transfer();
        }
    }

    /// One round of the loop; false when told to stop.
    fn turn(&mut self) -> bool {
        let scheduler = self.core.scheduler();
        let idle = scheduler.is_still() && !scheduler.has_unsaved() && self.embeds.is_empty();
        let mut commands = self
            .shared
            .inbox
            .receive(idle, &self.shared.health)
            .into_iter();
        while let Some(command) = commands.next() {
            match command {
                Command::Run(ready) => self.start(*ready),
                Command::Embed(job) => self.embeds.push_back(job),
                Command::Abort(request) => self.abort(request),
                // What is new is found by the plan.
                Command::Look => {}
                Command::Stop => {
                    // Prepared just before the stop, and as lost as what comes after it.
                    for command in commands {
                        command.reject(&engine_down("it was stopped"));
                    }
                    return false;
                }
            }
        }
        self.core.scheduler().pool().set_time(now_ms());
        if let Err(error) = self.step() {
            self.failed_steps += 1;
            match error.code {
                MEMORY_LOST => self.core.lose_memory(),
                WORKER_UNAVAILABLE => {
                    self.core.fail_all(&error, &mut self.replies);
                    self.core.lose_memory();
                }
                _ => self.core.fail_step(&error, &mut self.replies),
            }
        }
        self.embed_batch();
        self.publish_stats();
        self.shared.wake.signal();
        true
    }

    fn start(&mut self, ready: ReadyRequest) {
        let ReadyRequest { request, prepared } = ready;
        if request.open.aborted().is_some() {
            return request.abort();
        }
        let Request {
            submission,
            seed,
            lease,
            open,
            mut reply,
        } = request;
        let request = open.id();
        let (prompt_tokens, history_tokens) = (prepared.prompt.len(), prepared.history_tokens);
        if submission.token_ids.beside_text {
            reply.tell_ids(prepared.prompt.clone());
        }
        match self.core.add(request, &submission, prepared, lease, seed) {
            Ok(()) => {
                reply.accept(prompt_tokens, history_tokens);
                self.replies.open.insert(request, (reply, open));
            }
            Err(error) => {
                drop(open);
                reply.fail(error);
            }
        }
    }

    fn abort(&mut self, request: u64) {
        let how = self
            .replies
            .open
            .get(&request)
            .and_then(|(_, open)| open.aborted())
            .unwrap_or(Abort::Disconnect);
        self.core.abort(request, how, &mut self.replies);
    }

    fn step(&mut self) -> Result<()> {
        self.core.plan();
        self.transfer();
        let step = self.core.scheduler().step();
        if step.is_empty() {
            return Ok(());
        }
        if let Some(masks) = &step.masks {
            self.masking.begin(masks);
        }
        let begin = Instant::now();
        self.executor.launch(step)?;
        // While the device computes: what the last step left to read, and the books.
        self.shared.wake.signal();
        for &sequence in self.core.scheduler().started() {
            if let Some((_, open)) = self.replies.open.get_mut(&request_of(sequence).0)
                && open.start()
            {
                self.shared.admissions.latencies().start(open.age());
            }
        }
        self.executor
            .collect(self.core.scheduler().step(), &mut self.output)?;
        let seconds = begin.elapsed().as_secs_f64();
        self.core.scheduler_mut().note_time(seconds);
        self.core.commit(&self.output, &mut self.replies)
    }

    /// Copies what goes to the tiers below, and then what comes from there.
    fn transfer(&mut self) {
        let Transfers { saves, loads } = self.core.scheduler_mut().take_transfers();
        for save in saves {
            // What cannot be copied is not kept.
            if let Ok(bytes) = self.executor.save(save.place) {
                let payload = Payload::new(bytes);
                self.core.scheduler_mut().save(save, payload);
            }
        }
        let mut all = loads.iter();
        if !all.all(|load| self.executor.load(load.place, &load.payload).is_ok()) {
            self.failed_steps += 1;
            self.core.scheduler_mut().fail_loads(&loads);
        }
    }

    fn embed_batch(&mut self) {
        let Some(mut job) = self.embeds.pop_front() else {
            return;
        };
        if job.is_aborted() {
            return;
        }
        let (executor, embeds, tokens) =
            (&mut self.executor, &mut self.embeds, self.max_batch_tokens);
        // A job that panics is dropped, and so tells its client.
        drop(contain("an embedding", move || {
            job.start();
            match job.run(executor.as_mut(), tokens) {
                Ok(Embedded::All) => job.finish(),
                // Behind the others, so that a long list does not hold up a short one.
                Ok(Embedded::Batch) => embeds.push_back(job),
                // The model can go on with one text alone.
                Ok(Embedded::Part) => embeds.push_front(job),
                Err(error) => job.fail(error),
            }
        }));
    }

    fn publish_stats(&self) {
        let pool = self.core.scheduler().pool();
        let counts = pool.counts();
        let states = pool.states();
        let stats = Stats {
            scheduler: self.core.scheduler().stats(),
            free_blocks: counts.free,
            owned_blocks: counts.owned,
            cached_blocks: counts.cached,
            evictions: pool.evictions(),
            states: states.map(StatePool::counts).unwrap_or_default(),
            snapshots: states.map(StatePool::stats).unwrap_or_default(),
            windows: pool.window_counts(),
            failed_steps: self.failed_steps,
            ..Stats::default()
        };
        *lock(&self.shared.stats) = stats;
    }
}
