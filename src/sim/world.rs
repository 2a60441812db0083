//! One server with its clients on a virtual clock: the real core over the toy model, and everything that goes wrong.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use super::ToyModel;
use super::agents::Agent;
use super::check::{Check, ensure};
use super::config::{Config, TENANTS};
use super::journal::Journal;
use super::kept::{Batch, Conversation};
use super::ledger::{Fault, Ledger};
use super::random::Random;
use super::reader::{Observer, Replies};
use super::records::check_store;
use super::report::{Counters, Faults};
use super::tiers::{self, TierDrive};
use super::vocabulary::{END_TOKEN, VOCAB_SIZE};
use crate::engine::{
    Abort, Core, Executor, Limits, Prepared, StepOutput, TurnGuard, request_of, sequence_id,
};
use crate::error::Error;
use crate::guided::Matcher;
use crate::kv::{BlockPool, StatePool};
use crate::request::Submission;
use crate::sched::{NO_TOKEN, Scheduler};
use crate::session::{Lanes, SessionStore};
use crate::text::{ChatTemplate, Tokenizer};
use crate::tier::Store;

/// A request whose turn has begun and that the core has not seen yet.
pub(super) struct Preparing {
    pub(super) due: u64,
    pub(super) request: u64,
    pub(super) submission: Submission,
    pub(super) prepared: Prepared,
    pub(super) lease: Option<TurnGuard>,
}

pub(super) struct World {
    pub(super) config: Config,
    pub(super) random: Random,
    pub(super) now_ms: u64,
    pub(super) tick: u64,
    pub(super) store: Arc<Mutex<SessionStore>>,
    pub(super) journal: Option<Journal>,
    pub(super) lanes: Arc<Mutex<Lanes>>,
    pub(super) core: Core,
    pub(super) model: ToyModel,
    /// Of a server with tiers below the model's memory.
    pub(super) tiers: Option<Arc<Store>>,
    pub(super) drive: TierDrive,
    output: StepOutput,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) template: Arc<ChatTemplate>,
    /// Of the grammars that answers follow, at their beginnings.
    pub(super) matchers: Arc<[Matcher]>,
    pub(super) limits: Limits,
    pub(super) ledger: Ledger,
    pub(super) replies: Replies,
    pub(super) preparing: Vec<Preparing>,
    pub(super) conversations: [Conversation; 3],
    pub(super) batch: Batch,
    pub(super) agents: Vec<Agent>,
    pub(super) next_request: u64,
    pub(super) counters: Counters,
    pub(super) faults: Faults,
}

pub(super) fn text<T>(result: crate::error::Result<T>) -> Result<T, String> {
    result.map_err(|error| error.message)
}

impl World {
    pub(super) fn new(
        seed: u64,
        digest: u64,
        tokenizer: &Arc<Tokenizer>,
        template: &Arc<ChatTemplate>,
        matchers: &Arc<[Matcher]>,
    ) -> Result<Self, String> {
        let mut random = Random::new(seed);
        let config = Config::draw(&mut random);
        let drive = TierDrive::default();
        let (core, model, tiers) = Self::boot(&config, tokenizer, &drive, &mut random)?;
        let limits = Limits {
            context_length: core.scheduler().max_tokens(),
            vocab_size: VOCAB_SIZE as usize,
            keeps_borders: config.states.is_some() || config.windows.is_some(),
        };
        let (store, journal) = if config.durable {
            let (journal, store) = Journal::begin(config.sessions, 1)?;
            (store, Some(journal))
        } else {
            (SessionStore::new(config.sessions), None)
        };
        Ok(Self {
            config,
            random,
            now_ms: 1,
            tick: 0,
            store: Arc::new(Mutex::new(store)),
            journal,
            lanes: Arc::new(Mutex::new(Lanes::new(config.lanes))),
            core,
            model,
            tiers,
            drive,
            output: StepOutput::default(),
            tokenizer: Arc::clone(tokenizer),
            template: Arc::clone(template),
            matchers: Arc::clone(matchers),
            limits,
            ledger: Ledger::new(config.sessions),
            replies: Replies::new(config.reading, digest)?,
            preparing: Vec::new(),
            conversations: Default::default(),
            batch: Batch::default(),
            agents: Agent::all(),
            next_request: 1,
            counters: Counters::default(),
            faults: Faults::default(),
        })
    }

    pub(super) fn boot(
        config: &Config,
        tokenizer: &Arc<Tokenizer>,
        drive: &TierDrive,
        random: &mut Random,
    ) -> Result<(Core, ToyModel, Option<Arc<Store>>), String> {
        let (blocks, size) = (config.num_blocks, config.block_size);
        let (slots, every) = config.states.unwrap_or_default();
        let mut pool = BlockPool::new(blocks, size, config.prefix_cache).with_states(slots, every);
        let mut model = ToyModel::new(blocks, size, VOCAB_SIZE as usize)
            .with_states(slots)
            .with_guesses(config.guesses);
        if let Some((window, spare)) = config.windows {
            pool = pool.with_windows(window, blocks);
            let least = pool.least_window_blocks(config.scheduler.max_batch_tokens);
            let count = blocks.min(least + spare);
            pool = pool.with_windows(window, count);
            model = model.with_windows(window, count);
        }
        if config.tiers.is_some() {
            let tenants = 0..TENANTS as u32;
            pool = pool.with_names(
                tenants
                    .map(|tenant| (tenant, tiers::root(tenant)))
                    .collect(),
            );
        }
        let pool = Arc::new(pool);
        let scheduler = text(Scheduler::new(config.scheduler, pool))?;
        let mut scheduler = scheduler
            .with_policy(config.policy.policy())
            .with_speculation(config.speculation);
        let below = config
            .tiers
            .map(|limits| tiers::start(limits, drive, random));
        let (store, below) = below.unzip();
        if let Some(below) = below {
            scheduler = scheduler.with_below(below, random.range(1, 8));
        }
        let core = Core::new(scheduler, Some(Arc::clone(tokenizer)), vec![END_TOKEN]);
        Ok((core, model, store))
    }

    /// One step of the server; `unruly`: clients come, and things go wrong.
    pub(super) fn step(&mut self, unruly: bool) -> Check {
        self.tick += 1;
        self.now_ms += self.random.range(1, 20) as u64;
        if unruly && self.random.once_in(self.config.calm) {
            self.clients_act()?;
        }
        self.run_batch(unruly)?;
        self.admit_prepared()?;
        if unruly && self.random.once_in(self.config.kill) {
            self.kill()?;
        }
        if unruly {
            self.disturb_log();
        } else {
            self.mend_log()?;
        }
        self.disturb_tiers(unruly);
        self.compute(unruly)?;
        if let Some(unfair) = self.journal.as_mut().and_then(|j| j.unfair.take()) {
            return Err(unfair);
        }
        self.check()?;
        self.replies.read(&mut self.random)
    }

    /// Runs what gives events, and says what the ledger had against it.
    pub(super) fn observe<T>(
        &mut self,
        run: impl FnOnce(&mut Core, &StepOutput, &mut Observer<'_>) -> T,
    ) -> Result<T, String> {
        let mut observer = Observer {
            store: &self.store,
            journal: self.journal.as_mut(),
            ledger: &mut self.ledger,
            replies: &mut self.replies,
            tokenizer: &self.tokenizer,
            now_ms: self.now_ms,
            outcome: Ok(()),
        };
        let value = run(&mut self.core, &self.output, &mut observer);
        observer.outcome.map(|()| value)
    }

    fn admit_prepared(&mut self) -> Check {
        let tick = self.tick;
        let (due, later) = std::mem::take(&mut self.preparing)
            .into_iter()
            .partition(|ready| ready.due <= tick);
        self.preparing = later;
        for ready in due {
            self.admit(ready)?;
        }
        Ok(())
    }

    fn admit(&mut self, ready: Preparing) -> Check {
        let Preparing {
            request,
            submission,
            prepared,
            lease,
            ..
        } = ready;
        let open = self.ledger.open.get(&request);
        if open.is_none_or(|open| open.aborted.is_some()) {
            drop(lease);
            let gone = Error::internal("its client left before it began");
            self.replies.fail(request, gone);
            return self.ledger.fail(request);
        }
        let fault = open.and_then(|open| open.fault);
        if fault == Some(Fault::Panics) {
            self.faults.prepare_panics += 1;
            let caught = catch_unwind(AssertUnwindSafe(move || {
                let _held = (prepared, lease);
                // Without a word from the panic hook.
                resume_unwind(Box::new("a panic while it was prepared"));
            }));
            ensure(caught.is_err(), || "a panic was lost".into())?;
            self.replies.fail(request, Error::internal("it panicked"));
            return self.ledger.give_up(request, "internal_error");
        }
        self.make_faulty(request, submission.n as usize, prepared.prompt.len(), fault);
        let waiting = self.core.scheduler().stats().waiting;
        let (prompt_tokens, history_tokens) = (prepared.prompt.len(), prepared.history_tokens);
        let fits = waiting + submission.n as usize <= self.config.scheduler.max_queue;
        match self
            .core
            .add(request, &submission, prepared, lease, request)
        {
            Ok(()) => {
                self.replies.accept(request, prompt_tokens, history_tokens);
                if let Some(open) = self.ledger.open.get_mut(&request) {
                    open.admitted = true;
                }
                self.counters.admitted += 1;
                ensure(fits, || "the queue took more than its limit".into())
            }
            Err(error) => {
                let (code, message) = (error.code, error.message.clone());
                self.replies.fail(request, error);
                self.ledger.fail(request)?;
                self.counters.refused += 1;
                ensure(!fits && code == "queue_full", || {
                    format!("refused: {message}")
                })
            }
        }
    }

    /// Tells the model from which length on it cannot compute the choices of a request.
    fn make_faulty(&mut self, request: u64, choices: usize, prompt: usize, fault: Option<Fault>) {
        let faults = match fault {
            Some(Fault::FailsSteps) => {
                self.faults.failing_rows += 1;
                &mut self.model.failing
            }
            Some(Fault::NotFinite) => &mut self.model.not_finite,
            Some(Fault::Panics) | None => return,
        };
        let from = prompt + self.random.range(0, 4);
        faults.extend((0..choices).map(|choice| (sequence_id(request, choice), from)));
    }

    fn compute(&mut self, unruly: bool) -> Check {
        let still = self.core.scheduler().is_still();
        let empty = self.core.plan().is_empty();
        // Those that a tier is read for do not hold up the others.
        ensure(still || !empty, || {
            "requests wait, but nothing is planned".into()
        })?;
        self.transfer(unruly)?;
        if self.core.scheduler().step().is_empty() {
            return Ok(());
        }
        self.counters.steps += 1;
        if unruly && self.random.once_in(50) {
            // The plan stands: the step is computed without the one that left.
            self.hang_up()?;
        }
        let fault =
            (unruly && self.random.once_in(self.config.fault)).then(|| self.random.range(0, 2));
        if unruly {
            self.disturb_masks();
        }
        let step = self.core.scheduler().step();
        let launched = if fault == Some(0) {
            self.model.spoil_states(step);
            Err(Error::internal("the model failed"))
        } else {
            self.model.launch(step)
        };
        if launched.is_ok() {
            text(self.model.collect(step, &mut self.output))?;
        }
        if fault == Some(2) && launched.is_ok() {
            self.output.tokens.push(END_TOKEN);
            let refused = self.observe(|core, output, events| core.commit(output, events))?;
            ensure(refused.is_err(), || "a step took too many tokens".into())?;
        }
        if fault.is_some() || launched.is_err() {
            self.faults.failed_steps += u64::from(fault.is_some());
            return self.fail_step(fault.is_some());
        }
        self.take_tokens()?;
        let seconds = self.random.range(0, 20) as f64 / 1e3;
        self.core.scheduler_mut().note_time(seconds);
        text(self.observe(|core, output, events| core.commit(output, events))?)?;
        for request in std::mem::take(&mut self.replies.too_slow) {
            self.counters.too_slow += 1;
            self.abort(request, Abort::Disconnect)?;
        }
        Ok(())
    }

    /// The mask of an answer panics on the thread that computes it.
    fn disturb_masks(&mut self) {
        self.ledger.unmasked = None;
        let step = self.core.scheduler().step();
        if let Some(masks) = &step.masks
            && self.random.once_in(200)
        {
            // Without a word from the panic hook.
            let row = masks.next_by(|_| resume_unwind(Box::new("a panic while it was computed")));
            let guided = step.guided.iter().find(|(at, _)| Some(*at) == row);
            self.ledger.unmasked = guided.map(|&(_, id)| request_of(id));
            self.faults.mask_panics += 1;
        }
    }

    /// The step could not be computed; `by_chance`: whatever it held.
    fn fail_step(&mut self, by_chance: bool) -> Check {
        if let ([only], true) = (&*self.core.scheduler().step().scheduled, by_chance) {
            self.ledger.alone = Some(request_of(only.id).0);
        } else {
            self.counters.halved += 1;
        }
        let error = Error::internal("the model failed");
        let outcome = self.observe(|core, _, events| core.fail_step(&error, events));
        self.ledger.alone = None;
        outcome
    }

    /// Holds each sampled token to the one that its context alone gives. Those after a draft that was wrong, and those after an
    /// answer's end, are nobody's.
    fn take_tokens(&mut self) -> Check {
        let step = self.core.scheduler().step();
        let mut rows = self.output.tokens.iter().copied();
        for (scheduled, &end) in step.scheduled.iter().zip(&step.query_start[1..]) {
            if !scheduled.samples {
                continue;
            }
            let sampled: Vec<u32> = rows.by_ref().take(1 + scheduled.drafts).collect();
            let (request, choice) = request_of(scheduled.id);
            let Some(open) = self.ledger.open.get_mut(&request) else {
                continue;
            };
            let drafts = &step.token_ids[end as usize - scheduled.drafts..end as usize];
            let drafts = drafts.iter().map(|&draft| Some(draft as u32));
            for (token, draft) in sampled.into_iter().zip(drafts.chain([None])) {
                if token == NO_TOKEN && open.fault == Some(Fault::NotFinite) {
                    self.faults.not_finite_rows += 1;
                    break;
                }
                let expected = open.expected(choice);
                // Without its mask it is any token, and nobody's.
                let unmasked = self.ledger.unmasked == Some((request, choice));
                ensure(token == expected || unmasked, || {
                    format!("request {request}: token {token} came, {expected} is right")
                })?;
                open.answers[choice].tokens.push(token);
                self.counters.tokens += 1;
                self.counters.guided_tokens += u64::from(open.guide.is_some());
                if draft != Some(token) || open.has_ended(choice, &self.tokenizer) {
                    break;
                }
            }
        }
        Ok(())
    }

    fn check(&self) -> Check {
        let (scheduler, sizes) = (self.core.scheduler(), self.config.scheduler);
        let (pool, stats) = (scheduler.pool(), scheduler.stats());
        let (counts, references) = (pool.counts(), pool.references());
        let owned = references.iter().filter(|&&count| count > 0).count();
        let total = counts.free + owned + counts.cached;
        ensure(total == pool.num_blocks(), || {
            format!("{counts:?}, {owned} are owned")
        })?;
        let mut held = vec![0; references.len()];
        for sequence in scheduler.running().chain(scheduler.waiting()) {
            let table = sequence.table();
            for block in table.blocks().iter().copied().chain(table.copied_block()) {
                held[block as usize] += 1;
            }
        }
        let surplus = scheduler.running().find(|sequence| {
            let needed = sequence.tokens().len().div_ceil(pool.block_size());
            sequence.table().blocks().len() > needed
        });
        ensure(surplus.is_none(), || {
            format!("holds blocks for more than its tokens: {surplus:?}")
        })?;
        ensure(held == references, || {
            format!("held {held:?}, counted {references:?}")
        })?;
        self.check_states()?;
        self.check_windows()?;
        self.check_lanes()?;
        let most = sizes.max_queue + sizes.max_batch;
        let bounded = stats.running <= sizes.max_batch && stats.waiting <= most;
        ensure(bounded, || format!("out of bounds: {stats:?}"))?;
        let known = (stats.running + stats.waiting, self.core.open_choices());
        let expected = self.ledger.admitted_answers();
        ensure(known == (expected, expected), || {
            format!("{known:?} answers are open, not {expected}")
        })
    }

    /// Each slot is free, a snapshot, or one sequence's, and is counted for each that holds it.
    fn check_states(&self) -> Check {
        let scheduler = self.core.scheduler();
        let Some(states) = scheduler.pool().states() else {
            return Ok(());
        };
        let (counts, references) = (states.counts(), states.references());
        let mut held = vec![0; references.len()];
        for sequence in scheduler.running().chain(scheduler.waiting()) {
            for slot in sequence.table().held_slots() {
                held[slot as usize] += 1;
            }
        }
        ensure(held == references, || {
            format!("held slots {held:?}, counted {references:?}")
        })?;
        let total = counts.free + counts.owned + counts.snapshots;
        let used = references.iter().filter(|&&count| count > 0).count();
        ensure(total == states.num_slots() && counts.owned <= used, || {
            format!("{counts:?}, {used} slots are held")
        })
    }

    /// Each window block is free, cached, or counted for each sequence that holds it; and between two steps a sequence holds those
    /// alone that its window and what it computes next need.
    fn check_windows(&self) -> Check {
        let scheduler = self.core.scheduler();
        let (pool, Some((window, _))) = (scheduler.pool(), self.config.windows) else {
            return Ok(());
        };
        let (counts, references) = (pool.window_counts(), pool.window_references());
        let mut held = vec![0; references.len()];
        for sequence in scheduler.running().chain(scheduler.waiting()) {
            let table = sequence.table();
            let own = table.window().ok_or("a sequence without window blocks")?;
            ensure(own.first + own.blocks.len() == table.blocks().len(), || {
                format!("window blocks {own:?} of {:?}", table.blocks())
            })?;
            for &block in own.blocks.iter() {
                held[block as usize] += 1;
            }
            let size = pool.block_size();
            let ahead = table.blocks().len() - sequence.computed() / size;
            let most = window.div_ceil(size) + ahead;
            ensure(own.blocks.len() <= most, || {
                format!("{} window blocks, not {most}", own.blocks.len())
            })?;
        }
        ensure(held == references, || {
            format!("held window blocks {held:?}, counted {references:?}")
        })?;
        let owned = references.iter().filter(|&&count| count > 0).count();
        let total = counts.free + counts.cached + owned;
        ensure(total == references.len() && counts.owned == owned, || {
            format!("{counts:?}, {owned} window blocks are held")
        })
    }

    /// Whether everything that was admitted has ended and been read.
    pub(super) fn is_done(&self) -> bool {
        let nothing_open = self.ledger.open.is_empty() && self.preparing.is_empty();
        nothing_open && self.replies.are_read() && self.batch.has_ended()
    }

    /// What must hold when nothing runs.
    pub(super) fn check_rest(&self) -> Check {
        let pool = self.core.scheduler().pool();
        let counts = pool.counts();
        ensure(counts.owned == 0, || format!("idle, but {counts:?}"))?;
        let windows = pool.window_counts();
        ensure(windows.owned == 0, || format!("idle, but {windows:?}"))?;
        let states = pool.states().map(StatePool::counts).unwrap_or_default();
        ensure(states.owned == 0, || format!("idle, but {states:?}"))?;
        let busy = self
            .ledger
            .sessions
            .iter()
            .find(|(_, s)| s.running.is_some());
        ensure(busy.is_none(), || format!("{busy:?} is busy for ever"))?;
        self.check_idle_lanes()?;
        self.check_sessions()
    }

    /// Each session is at its last committed turn, whatever runs.
    pub(super) fn check_sessions(&self) -> Check {
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        check_store(&store, &self.ledger.sessions)
    }

    pub(super) fn abort(&mut self, request: u64, how: Abort) -> Check {
        let Some(open) = self.ledger.open.get_mut(&request) else {
            return Ok(());
        };
        open.aborted.get_or_insert(how);
        if !open.admitted {
            return Ok(());
        }
        let how = open.aborted.unwrap_or(how);
        self.observe(|core, _, events| core.abort(request, how, events))
    }
}
