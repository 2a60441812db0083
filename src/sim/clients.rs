//! What clients do to the server: start, continue and end conversations, leave, cancel, and send garbage.

use std::sync::PoisonError;

use serde_json::{Value, json};

use super::agents::Asked;
use super::check::{Check, ensure};
use super::config::TENANTS;
use super::open::{Answer, Fault, Open};
use super::vocabulary::{GUIDES, Guide, STOPS, VOCAB_SIZE};
use super::world::{Preparing, World};
use crate::engine::{Abort, TurnGuard, prepare_in_lane};
use crate::error::Error;
use crate::request::{self, Input, OnOverflow, SessionId, Submission};
use crate::session::{SessionKey, TurnHistory};

/// Sessions that clients of one tenant talk about.
const SESSION_IDS: usize = 6;

impl World {
    pub(super) fn clients_act(&mut self) -> Check {
        for _ in 0..self.random.range(0, self.config.arrivals) {
            match self.random.range(0, 21) {
                0 => self.send_garbage()?,
                1 => self.change_session()?,
                2 => self.converse()?,
                3 | 4 => self.run_agent()?,
                _ => {
                    let body = self.draw_submission();
                    self.submit(&body)?.ok();
                }
            }
        }
        if self.random.once_in(8) {
            self.hang_up()?;
        }
        if self.random.once_in(20) {
            self.cancel()?;
        }
        Ok(())
    }

    /// A client leaves, whether its request waits, runs or is still being prepared.
    pub(super) fn hang_up(&mut self) -> Check {
        let open: Vec<u64> = self.ledger.open.keys().copied().collect();
        let Some(&request) = self.random.pick(&open) else {
            return Ok(());
        };
        self.counters.disconnects += 1;
        self.replies.leave(request);
        self.abort(request, Abort::Disconnect)
    }

    fn cancel(&mut self) -> Check {
        let key = self.draw_key();
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        let running = store.running_request(&key);
        drop(store);
        let expected = self.ledger.sessions.get(&key).and_then(|s| s.running);
        ensure(running == expected, || {
            format!("{key:?} runs {running:?}, not {expected:?}")
        })?;
        running.map_or(Ok(()), |request| self.abort(request, Abort::Cancel))
    }

    pub(super) fn draw_key(&mut self) -> SessionKey {
        let tenant = self.random.range(0, TENANTS - 1) as u32;
        let id = self.random.range(0, SESSION_IDS - 1);
        // Half of them are numbers, half names.
        let text = [id.to_string(), format!("name {id}")];
        let id = SessionId::parse(&text[id % 2]);
        SessionKey::new(tenant, id.unwrap_or(SessionId::Number(0)))
    }

    /// Bytes that are no submission, and submissions out of bounds: a 400 each, and no trace.
    fn send_garbage(&mut self) -> Check {
        self.counters.garbage += 1;
        let mut body = self.draw_submission();
        let (field, value) = [
            ("n", json!(0)),
            ("n", json!(65)),
            ("priority", json!("high")),
            ("sampling", json!({"temperature": -1})),
            ("sampling", json!({"top_p": 1e9})),
            ("stopping", json!({"stop": [""]})),
            ("stopping", json!({"max_tokens": -1})),
            ("input", json!({"type": "tokens", "ids": [-1]})),
            ("unknown", Value::Null),
        ][self.random.range(0, 8)]
        .clone();
        body[field] = value;
        let refused = Submission::parse(body.to_string().as_bytes());
        ensure(refused.is_err_and(|e| e.kind.status() == 400), || {
            format!("accepted: {body}")
        })?;
        let mut bytes = self.draw_submission().to_string().into_bytes();
        for _ in 0..self.random.range(1, 4) {
            let at = self.random.range(0, bytes.len() - 1);
            bytes[at] = self.random.next() as u8;
        }
        bytes.truncate(self.random.range(0, bytes.len()));
        let refused = Submission::parse(&bytes);
        ensure(
            refused.is_ok() || refused.is_err_and(|e| e.kind.status() == 400),
            || "garbage is no 400".into(),
        )
    }

    pub(super) fn draw_submission(&mut self) -> Value {
        let random = &mut self.random;
        let common = random.once_in(2);
        let most = if random.once_in(6) { 60 } else { 12 };
        let count = random.range(0, most);
        // Often the same beginnings, so that prefixes are shared.
        let mut ids: Vec<u32> = if common {
            (0..count as u32).map(|at| at * 5 % VOCAB_SIZE).collect()
        } else {
            random.tokens(count, VOCAB_SIZE)
        };
        if random.once_in(40) {
            ids.push(VOCAB_SIZE);
        }
        let max_tokens = match random.range(0, 9) {
            0 => Value::Null,
            1 => json!(0),
            2 => json!(random.range(20, 100)),
            _ => json!(random.range(1, 16)),
        };
        let stop = if random.once_in(3) {
            STOPS[random.range(0, STOPS.len() - 1)]
        } else {
            &[]
        };
        let stop_token_ids = if random.once_in(5) {
            random.tokens(1, VOCAB_SIZE)
        } else {
            Vec::new()
        };
        let stopping = json!({
            "max_tokens": max_tokens,
            "min_tokens": if random.once_in(4) { random.range(1, 8) } else { 0 },
            "stop": stop,
            "stop_token_ids": stop_token_ids,
            "include_stop": random.once_in(2),
            "ignore_eos": random.once_in(2),
            "skip_special_tokens": !random.once_in(4),
        });
        let (key, parent) = (self.draw_key(), self.draw_key());
        let random = &mut self.random;
        let branches = random.once_in(8);
        let guide = random
            .once_in(8)
            .then(|| GUIDES[random.range(0, GUIDES.len() - 1)]);
        let session = if random.once_in(3) {
            Value::Null
        } else {
            let parent = branches.then_some(parent.id);
            json!({
                "id": key.id,
                "start": !branches && random.once_in(4),
                "create": !branches && random.once_in(2),
                "parent": parent,
                "end": random.once_in(8),
                "on_disconnect": if random.once_in(2) { "keep" } else { "rollback" },
            })
        };
        json!({
            "route": "generate",
            "stream": !random.once_in(4),
            "input": {"type": "tokens", "ids": ids},
            "n": if session.is_null() && random.once_in(6) { random.range(2, 3) } else { 1 },
            "session": session,
            "stopping": stopping,
            "on_overflow": if random.once_in(2) { "error" } else { "truncate_output" },
            "tenant": key.tenant,
            "priority": random.range(0, 2) as i64 - 1,
            "guide": guide.map(|guide| json!({"type": "regex", "pattern": guide.pattern()})),
        })
    }

    /// Sends a request; its number, or the status of its refusal.
    pub(super) fn submit(&mut self, body: &Value) -> Result<Result<u64, u16>, String> {
        self.submit_messages(body, None)
    }

    /// As [`Self::submit`]. `asked`: what a client asks in its lane.
    pub(super) fn submit_messages(
        &mut self,
        body: &Value,
        asked: Option<Asked>,
    ) -> Result<Result<u64, u16>, String> {
        let body = body.to_string();
        let mut submission = Submission::parse(body.as_bytes()).map_err(|error| error.message)?;
        let request = self.next_request;
        self.next_request += 1;
        self.counters.submitted += 1;
        let mut expected = Ok((Vec::new(), Vec::new()));
        let mut begun = Ok((None, TurnHistory::empty()));
        let session = submission.session.clone().map(|turn| {
            let key = SessionKey::new(submission.tenant, turn.id.clone());
            (key, turn)
        });
        if let Some((key, turn)) = &session {
            expected = self.ledger.begin(key, turn, request, self.now_ms);
            begun = TurnGuard::begin_turn(&self.store, key.clone(), turn, request, self.now_ms)
                .map(|(lease, base)| (Some(lease), base));
        }
        let ((history, turns), lease, base) = match (expected, begun) {
            (Ok(history), Ok((lease, base))) => (history, lease, base),
            (Err(status), Err(error)) if status == error.kind.status() => {
                self.counters.refused += 1;
                return Ok(Err(status));
            }
            (expected, begun) => {
                let begun = begun.map_err(|error| error.message);
                return Err(format!("begin of {session:?}: {begun:?}, not {expected:?}"));
            }
        };
        let prepared = prepare_in_lane(
            &mut submission,
            base,
            &self.lanes,
            Some(&self.tokenizer),
            Some(&self.template),
            self.limits,
            &|| Ok(()),
        );
        let guide = submission.guide.as_ref().and_then(|guide| {
            let same = |known: &Guide| {
                *guide
                    == request::Guide::Regex {
                        pattern: known.pattern(),
                    }
            };
            GUIDES.iter().position(same)
        });
        let mut open = Open {
            history_tokens: history.len(),
            prompt: history,
            max_tokens: 0,
            stopping: submission.stopping.clone(),
            guide: guide.map(|guide| GUIDES[guide]),
            session,
            turns,
            answers: (0..submission.n).map(|_| Answer::default()).collect(),
            aborted: None,
            admitted: false,
            fault: self.draw_fault(),
            lane: None,
        };
        let fits = match asked {
            None => self.fit(&submission, &mut open),
            Some(asked) => {
                let prepared = prepared.as_ref().ok();
                self.fit_messages(asked, &submission, prepared, &mut open)?
            }
        };
        match (prepared, fits) {
            (Ok(mut prepared), Ok(())) => {
                // As a template's system prompt would be.
                let border = self.random.range(1, prepared.prompt.len());
                prepared.borders.push(border);
                if let Some(guide) = guide {
                    let matcher = &self.matchers[guide];
                    prepared.matchers = (0..submission.n).map(|_| matcher.fork()).collect();
                }
                let same = prepared.prompt == open.prompt
                    && prepared.history_tokens == open.history_tokens
                    && prepared.max_tokens == open.max_tokens;
                ensure(same, || format!("{prepared:?}, not {open:?}"))?;
                let pace = [1, 1, 3, 20][self.random.range(0, 3)];
                self.replies.open(request, &submission, pace)?;
                self.ledger.open.insert(request, open);
                self.preparing.push(Preparing {
                    due: self.tick + self.random.range(0, 3) as u64,
                    request,
                    submission,
                    prepared,
                    lease,
                });
                Ok(Ok(request))
            }
            (Err(Error { code, kind, .. }), Err(expected)) if code == expected => {
                drop(lease);
                self.ledger.roll_back(&open);
                self.counters.refused += 1;
                Ok(Err(kind.status()))
            }
            (prepared, fits) => Err(format!("prepared {prepared:?}, not {fits:?}: {body}")),
        }
    }

    fn draw_fault(&mut self) -> Option<Fault> {
        let faults = [Fault::FailsSteps, Fault::NotFinite, Fault::Panics];
        let faulty = self.random.once_in(self.config.faulty);
        faulty.then(|| faults[self.random.range(0, 2)])
    }

    /// Puts the input behind the history; the code of the refusal where it does not fit.
    fn fit(&self, submission: &Submission, open: &mut Open) -> Result<(), &'static str> {
        if let Input::Tokens { ids } = &submission.input {
            if ids.iter().any(|&id| id >= VOCAB_SIZE) {
                return Err("invalid_value");
            }
            open.prompt.extend(ids);
        }
        if open.prompt.is_empty() {
            return Err("invalid_value");
        }
        open.max_tokens = self.most_tokens(submission, open.prompt.len())?;
        Ok(())
    }

    /// Tokens that may be generated after a prompt of `prompt` tokens; the code of the refusal where it does not fit.
    pub(super) fn most_tokens(
        &self,
        submission: &Submission,
        prompt: usize,
    ) -> Result<usize, &'static str> {
        let Some(room) = self.limits.context_length.checked_sub(prompt) else {
            return Err("context_length_exceeded");
        };
        let truncates = submission.on_overflow == OnOverflow::TruncateOutput;
        match submission.stopping.max_tokens.map(|n| n as usize) {
            Some(n) if n <= room => Ok(n),
            Some(_) if truncates && room > 0 => Ok(room),
            None if room > 0 => Ok(room),
            _ => Err("context_length_exceeded"),
        }
    }
}
