//! The path of a request from its JSON to the inbox: admission at once, then preparation on a thread of a pool.

use std::sync::Arc;

use super::clock::now_ms;
use super::embed::{EmbedJob, EmbedReply, EmbedSubmission};
use super::embed_tokens::EmbedTokens;
use super::grammars::Grammars;
use super::handle::Engine;
use super::health::engine_down;
use super::inbox::{Command, ReadyRequest, Request};
use super::lanes::prepare_in_lane;
use super::locks::lock;
use super::pool::{Job, Pool};
use super::shared::Shared;
use super::stream::Stream;
use super::turn_guard::TurnGuard;
use crate::error::{Error, Result};
use crate::request::{Input, SessionId, Submission};
use crate::session::{SessionKey, TurnBefore, TurnHistory};
use crate::text::PIECE_BYTES;
use crate::wire::{Mailbox, Reply};

impl Engine {
    /// `long`: the job may take long, so it waits only behind other long jobs.
    fn prepare_later(&self, long: bool, job: Job) -> Result<()> {
        let lane = if long {
            &self.preparing_long
        } else {
            &self.preparing
        };
        lane.run(job).map_err(|_| engine_down("it was stopped"))
    }

    /// Submits a request. `random` seeds its sampling if neither the request nor its session has a seed.
    ///
    /// # Errors
    /// At once: 400 `invalid_value`, 404 `session_not_found`, 409 `session_busy`, 429 `queue_full` or `rate_limit_exceeded`, 503,
    /// and 507 `storage_full` if the session log cannot be written. Errors of the template, the tokenizer, the lengths or the
    /// tenant's tokens per minute come through the stream, before its first byte.
    pub fn submit(&self, json: &[u8], random: u64) -> Result<Stream> {
        let mut submission = Submission::parse(json)?;
        let tenant = submission.tenant;
        submission.priority = self
            .shared
            .admissions
            .accounts()
            .priority(tenant, submission.priority)?;
        if !self.model.can_generate {
            return Err(Error::invalid(
                "model",
                "this model computes embeddings and cannot generate text",
            ));
        }
        let mut open = self
            .shared
            .admit(tenant, submission.n as usize, submission.background)?;
        let (id, record) = (open.id(), open.record());
        let said = self.turn_before(&submission);
        let (lease, base) = match &submission.session {
            None => (None, TurnHistory::empty()),
            Some(_) if said.is_some() => (None, TurnHistory::empty()),
            Some(session) => {
                if let Some(fault) = self.session_log_fault() {
                    return Err(fault.error());
                }
                let key = SessionKey::new(submission.tenant, session.id.clone());
                let (lease, base) =
                    TurnGuard::begin_turn(&self.shared.sessions, key, session, id, now_ms())?;
                (Some(lease), base)
            }
        };
        let adapter = self.shared.adapters.begin(submission.adapter, &base)?;
        submission.adapter = adapter.as_ref().map(|adapter| adapter.number);
        submission.adapter_digest = adapter.as_ref().map(|adapter| adapter.digest);
        open.keep(adapter);
        let seed = submission.sampling.seed.or(base.seed).unwrap_or(random);
        let mailbox = Mailbox::new(id, Arc::clone(&self.shared.wake));
        let mut reply = Reply::new(&submission, Arc::clone(&mailbox))?;
        if let Some(session) = &submission.session
            && session.by_default
            && base.replaced_turns > 0
        {
            reply.warn(dropped(&session.id, base.replaced_turns));
        }
        let long = json.len() > PIECE_BYTES && !matches!(submission.input, Input::Tokens { .. });
        let mut request = Request {
            submission,
            seed,
            lease,
            open,
            reply,
        };
        let (model, limits, shared) = (self.model.clone(), self.limits, Arc::clone(&self.shared));
        let (grammars, compiling) = (Arc::clone(&self.grammars), Arc::clone(&self.compiling));
        let job = move || {
            let open = &request.open;
            let submission = &mut request.submission;
            let prepared = shared.wanted(open).and_then(|()| {
                prepare_in_lane(
                    submission,
                    base,
                    &shared.lanes,
                    model.tokenizer.as_deref(),
                    model.template.as_deref(),
                    limits,
                    &|| shared.wanted(open),
                )
            });
            let prepared = prepared.map(|prepared| match said {
                Some(said) => prepared.saying_again(said, limits),
                None => prepared,
            });
            // A request without a limit may end soon, so its generated tokens are charged when it ends.
            let limited = submission.stopping.max_tokens.is_some();
            let choices = submission.n as usize;
            let reserved = prepared.and_then(|prepared| {
                let output = if limited { prepared.max_tokens } else { 0 };
                let open = &mut request.open;
                open.reserve(prepared.input_tokens, output * choices)
                    .map(|()| prepared)
            });
            match reserved {
                Ok(prepared) => {
                    let ready = Box::new(ReadyRequest { request, prepared });
                    return guide_and_send(ready, grammars, &compiling, shared);
                }
                Err(_) if request.open.aborted().is_some() => request.abort(),
                Err(error) => request.fail(error),
            }
            shared.wake.signal();
        };
        let stream = Stream {
            mailbox,
            shared: Arc::clone(&self.shared),
            record,
        };
        self.prepare_later(long, Box::new(job))?;
        Ok(stream)
    }

    /// The committed turn that a request repeats, found by its turn key.
    fn turn_before(&self, submission: &Submission) -> Option<TurnBefore> {
        let (session, turn) = (submission.session.as_ref()?, submission.turn_key?);
        let key = SessionKey::new(submission.tenant, session.id.clone());
        let sessions = lock(&self.shared.sessions);
        sessions.state(&key).ok()?.turn_before(turn)
    }

    /// Submits an embedding request. The stream gets the whole reply at once.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn embed(&self, json: &[u8]) -> Result<Stream> {
        let size = self.model.embedding_size;
        let submission = EmbedSubmission::parse(json, size)?;
        if !self.model.can_embed {
            return Err(Error::invalid(
                "model",
                "this model cannot compute embeddings",
            ));
        }
        let open = self
            .shared
            .admit(submission.tenant, 1, submission.background)?;
        let mailbox = Mailbox::new(open.id(), Arc::clone(&self.shared.wake));
        let stream = Stream {
            mailbox: Arc::clone(&mailbox),
            shared: Arc::clone(&self.shared),
            record: open.record(),
        };
        let (model, shared) = (self.model.clone(), Arc::clone(&self.shared));
        let long = json.len() > PIECE_BYTES;
        let reply = EmbedReply::new(mailbox);
        let job = move || {
            // Moved into the job as one tuple, so that after a panic they are dropped in this order.
            let (mut open, reply) = (open, reply);
            let wanted = || shared.wanted(&open);
            let tokens = EmbedTokens {
                tokenizer: model.tokenizer.as_deref(),
                max_len: model.max_embed_len,
                vocab_size: model.vocab_size,
                fields: &submission.fields,
                wanted: &wanted,
            };
            let tokenized = tokens.of(&submission);
            let reserved = tokenized.and_then(|sequences| {
                let tokens = sequences.iter().map(Vec::len).sum();
                open.reserve(tokens, 0).map(|()| sequences)
            });
            match reserved {
                Ok(sequences) => {
                    let job = EmbedJob::new(submission, sequences, size, open, reply);
                    shared.send(Command::Embed(Box::new(job)));
                }
                Err(error) => {
                    drop(open);
                    reply.fail(error);
                    shared.wake.signal();
                }
            }
        };
        self.prepare_later(long, Box::new(job))?;
        Ok(stream)
    }
}

/// Sends a prepared request to the engine's thread, with its matchers if it follows a grammar. A grammar that is not compiled yet
/// is compiled on `compiling`, so that it delays no other request's preparation.
fn guide_and_send(
    mut ready: Box<ReadyRequest>,
    grammars: Arc<Grammars>,
    compiling: &Pool,
    shared: Arc<Shared>,
) {
    let answer = &ready.prepared.answer;
    ready.request.reply.expect(answer);
    let Some(grammar) = ready.prepared.grammar.take() else {
        return shared.send(Command::Run(ready));
    };
    let choices = ready.request.submission.n as usize;
    if let Some(matchers) = grammars.cached(&grammar, choices) {
        ready.prepared.matchers = matchers;
        return shared.send(Command::Run(ready));
    }
    let compile = move || match grammars.matchers(&grammar, choices) {
        Ok(matchers) => {
            ready.prepared.matchers = matchers;
            shared.send(Command::Run(ready));
        }
        Err(error) => {
            Command::Run(ready).reject(&error);
            shared.wake.signal();
        }
    };
    if let Err(compile) = compiling.run(Box::new(compile)) {
        // The engine is stopping, and the request gets an error.
        compile();
    }
}

/// Warns a client that its request replaced a session only because of a default.
fn dropped(id: &SessionId, turns: usize) -> String {
    let noun = if turns == 1 { "turn" } else { "turns" };
    format!(
        "this request dropped session {id} with its {turns} {noun}: it left out sequence_start, whose default is \
         true; to continue a session, send sequence_start false or use POST /v1/sessions/{id}/turns"
    )
}
