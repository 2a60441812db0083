//! One server on a virtual clock: the real scheduler, block pool and sessions, and requests that arrive as the trace says.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use super::Tally;
use super::measures::Span;
use super::setup::{Setup, TraceRequest, VOCAB_SIZE};
use crate::engine::{
    Core, Events, FinishedTurn, Limits, StepOutput, TurnGuard, prepare, request_of,
};
use crate::error::{Error, Kind, Result};
use crate::request::{Input, Submission};
use crate::sched::{FinishReason, Scheduler};
use crate::session::{SessionKey, SessionStore, Start, StoreLimits, TurnHistory};
use crate::wire::{Delta, Usage};

/// A request that the server works on.
struct Open {
    session: Option<i64>,
    /// When its client began to wait.
    started: f64,
    /// When its last token came.
    last_token: Option<f64>,
}

/// The requests that a step ended; their turns are committed at that time.
#[derive(Default)]
struct Ended {
    requests: Vec<(u64, Usage)>,
    now_ms: u64,
}

impl Events for Ended {
    fn delta(&mut self, _: u64, _: usize, _: Delta) {}

    fn finish(
        &mut self,
        request: u64,
        _: usize,
        _: Delta,
        _: FinishReason,
        usage: Usage,
        turn: Option<FinishedTurn>,
    ) {
        if let Some(turn) = turn {
            turn.commit(self.now_ms);
        }
        self.requests.push((request, usage));
    }

    fn fail(&mut self, _: u64, _: &Error, _: Usage) {}
}

pub(super) struct Replica<'a> {
    setup: &'a Setup,
    tally: &'a mut Tally,
    core: Core,
    sessions: Arc<Mutex<SessionStore>>,
    limits: Limits,
    template: Submission,
    now: f64,
    arrivals: VecDeque<TraceRequest>,
    /// Turns of busy sessions, which wait for the one before them.
    queued: HashMap<i64, VecDeque<TraceRequest>>,
    open: HashMap<u64, Open>,
    next_request: u64,
    ended: Ended,
    output: StepOutput,
}

/// A token of prompt or output that no other request has at that place.
const fn own_token(request: u64, at: usize) -> u32 {
    let mixed = (request + 1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add((at as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9));
    (mixed >> 34) as u32
}

impl<'a> Replica<'a> {
    pub(super) fn new(
        setup: &'a Setup,
        arrivals: VecDeque<TraceRequest>,
        tally: &'a mut Tally,
    ) -> Result<Self> {
        let scheduler = Scheduler::new(setup.scheduler(), Arc::new(setup.pool()))?;
        let limits = Limits {
            context_length: scheduler.max_tokens(),
            vocab_size: VOCAB_SIZE,
            keeps_borders: setup.num_window_blocks > 0,
        };
        let limit = StoreLimits {
            max_sessions: usize::MAX,
            ttl_ms: 0,
        };
        let template = br#"{"route": "completions", "input": {"type": "tokens", "ids": []}}"#;
        Ok(Self {
            setup,
            tally,
            core: Core::new(scheduler, None, Vec::new()),
            sessions: Arc::new(Mutex::new(SessionStore::new(limit))),
            limits,
            template: Submission::parse(template)?,
            now: 0.0,
            arrivals,
            queued: HashMap::new(),
            open: HashMap::new(),
            next_request: 0,
            ended: Ended::default(),
            output: StepOutput::default(),
        })
    }

    /// Serves until every request has ended.
    pub(super) fn run(mut self) -> Result<()> {
        loop {
            while let Some(&request) = self
                .arrivals
                .front()
                .filter(|next| next.arrival <= self.now)
            {
                self.arrivals.pop_front();
                self.arrive(request)?;
            }
            if !self.core.plan().is_empty() {
                self.step()?;
            } else if !self.core.scheduler().is_idle() {
                return Err(Error::internal("requests wait, but nothing is planned"));
            } else if let Some(next) = self.arrivals.front() {
                self.now = next.arrival;
            } else {
                break;
            }
        }
        let scheduler = self.core.scheduler();
        self.tally.preemptions += scheduler.stats().preemptions;
        self.tally.recomputed_tokens += scheduler.stats().recomputed_tokens;
        self.tally.steps += scheduler.stats().steps;
        self.tally.computed_tokens += scheduler.stats().computed_tokens;
        self.tally.evictions += scheduler.pool().evictions();
        self.tally.elapsed = self.tally.elapsed.max(self.now);
        Ok(())
    }

    fn arrive(&mut self, request: TraceRequest) -> Result<()> {
        if let Some(session) = request.session {
            if let Some(queue) = self.queued.get_mut(&session) {
                queue.push_back(request);
                return Ok(());
            }
            self.queued.insert(session, VecDeque::new());
        }
        let taken = self.submit(&request, request.arrival)?;
        match request.session {
            Some(session) if !taken => self.continue_session(session),
            _ => Ok(()),
        }
    }

    /// Begins the next turn of a session that has none running.
    fn continue_session(&mut self, session: i64) -> Result<()> {
        while let Some(request) = self.queued.get_mut(&session).and_then(VecDeque::pop_front) {
            if self.submit(&request, self.now)? {
                return Ok(());
            }
        }
        self.queued.remove(&session);
        Ok(())
    }

    /// Hands a request to the scheduler; false if it is refused.
    fn submit(&mut self, request: &TraceRequest, started: f64) -> Result<bool> {
        let id = self.next_request;
        self.next_request += 1;
        match self.admit(id, request) {
            Ok(()) => {
                let open = Open {
                    session: request.session,
                    started,
                    last_token: None,
                };
                self.open.insert(id, open);
                Ok(true)
            }
            Err(error) if matches!(error.kind, Kind::Invalid | Kind::Busy) => {
                *self.tally.refused.entry(error.code).or_default() += 1;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn admit(&mut self, id: u64, request: &TraceRequest) -> Result<()> {
        let own = (request.shared_tokens..request.prompt_tokens).map(|at| own_token(id, at));
        let ids = (0..request.shared_tokens as u32).chain(own).collect();
        let mut submission = self.template.clone();
        submission.input = Input::Tokens { ids };
        submission.stopping.max_tokens = Some(request.output_tokens as u32);
        let now_ms = (self.now * 1e3) as u64;
        let (mut lease, mut base) = (None, TurnHistory::empty());
        if let Some(session) = request.session {
            let key = SessionKey::new(0, session);
            let (held, history) = TurnGuard::begin(&self.sessions, key, id, Start::Create, now_ms)?;
            (lease, base) = (Some(held), history);
        }
        let prepared = prepare(&submission, base, None, None, self.limits, &|| Ok(()))?;
        self.core.add(id, &submission, prepared, lease, id)
    }

    fn step(&mut self) -> Result<()> {
        let (scheduler, tally) = (self.core.scheduler(), &mut *self.tally);
        let step = scheduler.step();
        let seconds = self.setup.step_model.seconds(step);
        self.now += seconds;
        self.output.tokens.clear();
        for scheduled in step.scheduled.iter().filter(|scheduled| scheduled.samples) {
            let request = request_of(scheduled.id).0;
            if let Some(open) = self.open.get_mut(&request) {
                match open.last_token.replace(self.now) {
                    None => tally
                        .first_tokens
                        .push((open.started, self.now - open.started)),
                    Some(last) => tally.gaps.add(self.now - last),
                }
            }
            self.output.tokens.push(own_token(request, 0));
        }
        let (stats, counts) = (scheduler.stats(), scheduler.pool().counts());
        tally.busy += seconds;
        tally.timeline.add(
            self.now,
            Span {
                output_tokens: step.num_rows() as f64,
                running: stats.running as f64 * seconds,
                waiting: stats.waiting as f64 * seconds,
                owned_blocks: counts.owned as f64 * seconds,
            },
        );
        self.ended.now_ms = (self.now * 1e3) as u64;
        self.core.commit(&self.output, &mut self.ended)?;
        for (request, usage) in std::mem::take(&mut self.ended.requests) {
            self.tally.completed += 1;
            self.tally.prompt_tokens += usage.prompt_tokens as u64;
            self.tally.output_tokens += usage.completion_tokens as u64;
            self.tally.cached_tokens += usage.cached_tokens as u64;
            if let Some(session) = self.open.remove(&request).and_then(|open| open.session) {
                self.continue_session(session)?;
            }
        }
        Ok(())
    }
}
