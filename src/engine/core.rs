//! The engine as a pure state machine: scheduler, sessions and text, without a clock, a thread or a socket. The server's
//! thread drives it, and so does whoever embeds it.

use std::collections::HashMap;
use std::sync::Arc;

use super::choice::{Choice, OpenTurn, Scoring, finished_turn, kept_tokens};
use super::events::{Abort, Events, request_of, sequence_id};
use super::executor::StepOutput;
use super::guide::{Failures, Guide};
use super::prepare::Prepared;
use super::thoughts::ThoughtLimit;
use super::token_sink::{TokenSink, token_logprob};
use super::turn_guard::TurnGuard;
use crate::error::{Error, Result};
use crate::guided::{MaskRow, StepMasks};
use crate::kv::Owner;
use crate::request::{MAX_CHOICES, OnDisconnect, Retention, Submission};
use crate::sched::{FinishReason, Finished, NewSequence, Scheduler, Sequence, Step, mix_seed};
use crate::text::{Detokenizer, StopMatcher, Tokenizer};
use crate::wire::{Delta, Usage};

/// Scheduler, sessions and text of one model.
#[derive(Debug)]
pub struct Core {
    scheduler: Scheduler,
    tokenizer: Option<Arc<Tokenizer>>,
    eos_tokens: Arc<[u32]>,
    choices: HashMap<u64, Choice>,
    finished: Vec<Finished>,
    /// Owners and tokens of turns whose KV is not needed any more.
    given_up: Vec<(Owner, Vec<u32>)>,
}

impl Core {
    /// A core over `scheduler`. Without a tokenizer events carry no text.
    pub fn new(
        scheduler: Scheduler,
        tokenizer: Option<Arc<Tokenizer>>,
        eos_tokens: Vec<u32>,
    ) -> Self {
        Self {
            scheduler,
            tokenizer,
            eos_tokens: eos_tokens.into(),
            choices: HashMap::new(),
            finished: Vec::new(),
            given_up: Vec::new(),
        }
    }

    /// The scheduler, to be set up before the first request, and told of times.
    pub const fn scheduler_mut(&mut self) -> &mut Scheduler {
        &mut self.scheduler
    }

    /// The scheduler.
    pub const fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Tokens that a waiting or running sequence has generated; None once it has ended.
    pub fn tokens_of(&self, sequence: u64) -> Option<usize> {
        self.choices.get(&sequence).map(|choice| choice.tokens)
    }

    /// Choices that wait or run.
    pub fn open_choices(&self) -> usize {
        self.choices.len()
    }

    /// Takes a prepared request in. `lease` is its session's turn; `seed` decides its sampling.
    ///
    /// # Errors
    /// Those of [`Scheduler::add`]; nothing of the request stays then.
    pub fn add(
        &mut self,
        request: u64,
        submission: &Submission,
        prepared: Prepared,
        lease: Option<TurnGuard>,
        seed: u64,
    ) -> Result<()> {
        let stopping = &submission.stopping;
        let mut matchers = prepared.matchers.into_iter();
        let guided = matchers.len() > 0;
        let markers: Arc<[u32]> = prepared.markers.into();
        let own = stopping.stop_token_ids.iter().copied();
        // Where a grammar allows an end token, it is the grammar's end.
        let ends = guided || !stopping.ignore_eos;
        let model = self.eos_tokens.iter().copied().filter(|_| ends);
        let stop_tokens: Arc<[u32]> = own.chain(model).collect();
        let session = submission.session.as_ref();
        let mut turn = lease.map(|lease| OpenTurn {
            lease,
            turns: prepared.turns,
            system_tokens: prepared.system_tokens,
            end: session.is_some_and(|session| session.end),
            on_disconnect: session.map_or(OnDisconnect::Rollback, |session| session.on_disconnect),
            owner: Owner {
                tenant: submission.tenant,
                adapter: submission.adapter.unwrap_or(0),
            },
            adapter: submission.adapter_digest,
            retention: session.and_then(|session| session.retention),
            key: submission.turn_key,
        });
        let mut lane = prepared.lane;
        let end = stop_tokens.first().copied();
        let mut borders = prepared.borders;
        if submission.n > 1 {
            // All of the prompt but its last token, whose logits each choice needs.
            borders.push(prepared.prompt.len() - 1);
        }
        for index in 0..submission.n {
            let id = sequence_id(request, index as usize);
            let seed = mix_seed(seed, index);
            let added = self.scheduler.add(NewSequence {
                id,
                tenant: submission.tenant,
                adapter: submission.adapter.unwrap_or(0),
                priority: submission.priority,
                prompt: prepared.prompt.clone(),
                max_tokens: prepared.max_tokens,
                min_tokens: stopping.min_tokens as usize,
                stop_tokens: Arc::clone(&stop_tokens),
                sampling: submission.sampling.clone(),
                seed,
                prompt_logprobs: submission.scored_alternatives(),
                guided: guided || prepared.thoughts.is_some() || prepared.said.is_some(),
                borders: borders.clone(),
            });
            if let Err(error) = added {
                self.drop_request(request);
                return Err(error);
            }
            let mut scoring = Scoring::of(submission, prepared.echo.as_ref());
            let mut delta = Delta::default();
            if let Some(echo) = &prepared.echo {
                delta.text.push_str(&echo.text);
            }
            if let Some(tokenizer) = &self.tokenizer {
                let first = token_logprob(tokenizer, prepared.prompt[0], None, &[]);
                scoring.push(&mut delta, first);
            }
            let choice = Choice {
                detokenizer: Detokenizer::new(stopping.skip_special_tokens),
                matcher: StopMatcher::new(&stopping.stop, stopping.include_stop),
                tokens: 0,
                delta,
                prompt_tokens: prepared.prompt.len(),
                history_tokens: prepared.history_tokens,
                seed,
                tail: prepared.tail,
                wants_ids: submission.token_ids.beside_text,
                wants_logprobs: submission.sampling.logprobs.is_some(),
                logprobs: (turn.is_some() && submission.sampling.logprobs.is_some()).then(Vec::new),
                scoring,
                markers: Arc::clone(&markers),
                guide: matchers.next().map(|matcher| {
                    let min_tokens = stopping.min_tokens as usize;
                    Guide::new(matcher, Arc::clone(&stop_tokens), min_tokens)
                }),
                thoughts: prepared.thoughts.as_ref().map(ThoughtLimit::begin),
                turn: turn.take(),
                lane: lane.take(),
                said: prepared.said.clone().map(|said| (said, end)),
            };
            self.choices.insert(id, choice);
        }
        Ok(())
    }

    /// Plans the next step; empty if there is nothing to do.
    pub fn plan(&mut self) -> &Step {
        let guided = &self.scheduler.plan().guided;
        let rows = guided
            .iter()
            .filter_map(|&(row, id)| self.choices.get(&id)?.mask_row(row));
        let rows: Vec<MaskRow> = rows.collect();
        if !rows.is_empty() {
            let masks = StepMasks::new(rows, Arc::clone(&self.eos_tokens));
            self.scheduler.set_masks(Arc::new(masks));
        }
        self.scheduler.step()
    }

    /// Books the outcome of the planned step.
    ///
    /// # Errors
    /// `internal_error` if `output` does not fit the step; nothing is booked then.
    pub fn commit(&mut self, output: &StepOutput, events: &mut impl Events) -> Result<()> {
        let tokenizer = self.tokenizer.as_deref();
        let mut failures = Failures::new();
        let mut texts = TokenSink {
            choices: &mut self.choices,
            tokenizer,
            output,
            masks: self.scheduler.step().masks.clone(),
            failures: &mut failures,
            events,
        };
        self.scheduler.note_guesses(&output.guesses);
        self.scheduler
            .commit(&output.tokens, &mut texts, &mut self.finished)?;
        for (request, error) in failures {
            self.fail_request(request, &error, events);
        }
        let mut finished = std::mem::take(&mut self.finished);
        for Finished { sequence, reason } in finished.drain(..) {
            self.finish(&sequence, reason, events);
        }
        self.finished = finished;
        // Now that nobody owns their blocks.
        for (owner, tokens) in self.given_up.drain(..) {
            self.scheduler.pool().give_up(owner, &tokens);
        }
        Ok(())
    }

    fn finish(&mut self, sequence: &Sequence, reason: FinishReason, events: &mut impl Events) {
        let Some(mut choice) = self.choices.remove(&sequence.id()) else {
            return;
        };
        let mut delta = std::mem::take(&mut choice.delta);
        if let Some(tokenizer) = &self.tokenizer {
            let rest = choice.detokenizer.flush(tokenizer);
            delta.text.push_str(&choice.matcher.push(&rest).emit);
            delta.text.push_str(&choice.matcher.flush());
        }
        delta.tokens = choice.tokens;
        delta.stop_string = choice.matcher.found().map(str::to_owned);
        if let Some(mut lane) = choice.lane.take()
            // What was cut off behind a stop string is in the tokens, and not in what the client was told.
            && reason != FinishReason::Abort
            && delta.stop_string.is_none()
        {
            lane.say(&delta.text);
            let tokens = kept_tokens(sequence, reason);
            lane.finish(tokens, choice.prompt_tokens, choice.tail);
        }
        let usage = Usage {
            prompt_tokens: choice.prompt_tokens,
            history_tokens: choice.history_tokens,
            cached_tokens: sequence.cached_tokens(),
            completion_tokens: choice.tokens,
        };
        let turn = choice.turn.take();
        if let Some(turn) = &turn {
            self.keep_cached(turn, kept_tokens(sequence, reason));
        }
        let turn = turn.map(|turn| finished_turn(turn, &choice, sequence, reason, usage));
        let (request, index) = request_of(sequence.id());
        events.finish(request, index, delta, reason, usage, turn);
    }

    /// What becomes of the KV of a session's turn that has ended: it is held, given up, or evicted in its time.
    fn keep_cached(&mut self, turn: &OpenTurn, tokens: &[u32]) {
        match turn.retention {
            Some(Retention::GiveUp) => self.given_up.push((turn.owner, tokens.to_vec())),
            Some(Retention::Hold { ms }) => self.scheduler.pool().hold(turn.owner, tokens, ms),
            None => {}
        }
    }

    /// Ends a request before its time. A turn that has generated nothing yet leaves no trace.
    pub fn abort(&mut self, request: u64, how: Abort, events: &mut impl Events) {
        for index in 0..MAX_CHOICES as usize {
            let id = sequence_id(request, index);
            if !self.choices.contains_key(&id) {
                continue;
            }
            let Some(sequence) = self.scheduler.abort(id) else {
                continue;
            };
            if let Some(choice) = self.choices.get_mut(&id) {
                let keeps = |turn: &OpenTurn| {
                    how == Abort::Cancel || turn.on_disconnect == OnDisconnect::Keep
                };
                if sequence.output().is_empty() || !choice.turn.as_ref().is_some_and(keeps) {
                    choice.turn = None;
                }
            }
            self.finish(&sequence, FinishReason::Abort, events);
        }
    }

    /// Books that the planned step could not be computed: it is tried again in halves, and the request of a sequence that fails alone
    /// is given up.
    pub fn fail_step(&mut self, error: &Error, events: &mut impl Events) {
        let Some(sequence) = self.scheduler.fail_step() else {
            return;
        };
        let request = request_of(sequence.id()).0;
        if let Some(mut usage) = self.drop_request(request) {
            usage.cached_tokens = sequence.cached_tokens();
            events.fail(request, error, usage);
        }
    }

    /// The model has lost its memory: whatever runs is computed anew, and no prefix is cached any more.
    pub fn lose_memory(&mut self) {
        self.scheduler.lose_memory();
    }

    /// Gives up every request.
    pub fn fail_all(&mut self, error: &Error, events: &mut impl Events) {
        let mut requests: Vec<u64> = self.choices.keys().map(|&id| request_of(id).0).collect();
        requests.sort_unstable();
        requests.dedup();
        for request in requests {
            self.fail_request(request, error, events);
        }
    }

    fn fail_request(&mut self, request: u64, error: &Error, events: &mut impl Events) {
        if let Some(usage) = self.drop_request(request) {
            events.fail(request, error, usage);
        }
    }

    /// What the request's open choices have used; None if it has none.
    fn drop_request(&mut self, request: u64) -> Option<Usage> {
        let mut used: Option<Usage> = None;
        for index in 0..MAX_CHOICES as usize {
            let id = sequence_id(request, index);
            let Some(choice) = self.choices.remove(&id) else {
                continue;
            };
            let sequence = self.scheduler.abort(id);
            let ended = self.finished.iter().map(|finished| &finished.sequence);
            let mut any = sequence.iter().chain(ended);
            let cached = any.find(|sequence| sequence.id() == id);
            let earlier = used.map_or(0, |usage| usage.completion_tokens);
            used = Some(Usage {
                prompt_tokens: choice.prompt_tokens,
                history_tokens: choice.history_tokens,
                cached_tokens: cached.map_or(0, |sequence| sequence.cached_tokens()),
                completion_tokens: earlier + choice.tokens,
            });
        }
        used
    }
}
