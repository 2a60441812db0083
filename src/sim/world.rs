//! One server with its clients on a virtual clock: the real core over the toy model, and everything that goes wrong.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};

use super::ToyModel;
use super::agents::Agent;
use super::check::{Check, ensure};
use super::config::{Config, TENANTS};
use super::journal::Journal;
use super::kept::{Batch, Conversation};
use super::ledger::Ledger;
use super::open::Fault;
use super::random::Random;
use super::reader::{Observer, Replies};
use super::report::{Counters, Faults};
use super::tiers::{self, TierDrive};
use super::vocabulary::{END_TOKEN, VOCAB_SIZE};
use crate::engine::{Abort, Core, Limits, Prepared, StepOutput, TurnGuard, sequence_id};
use crate::error::Error;
use crate::guided::Matcher;
use crate::kv::BlockPool;
use crate::request::Submission;
use crate::sched::Scheduler;
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
    pub(super) output: StepOutput,
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

    /// Whether everything that was admitted has ended and been read.
    pub(super) fn is_done(&self) -> bool {
        let nothing_open = self.ledger.open.is_empty() && self.preparing.is_empty();
        nothing_open && self.replies.are_read() && self.batch.has_ended()
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
