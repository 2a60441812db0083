//! What clients do to sessions without a turn: fork, rewind and end them.

use std::sync::{Arc, PoisonError};

use super::check::{Check, ensure};
use super::records::Session;
use super::world::World;
use crate::engine::{FinishedTurn, TurnGuard};
use crate::error::Result;
use crate::session::{Commit, SessionKey, Start};

impl World {
    pub(super) fn change_session(&mut self) -> Check {
        self.counters.verbs += 1;
        let key = self.draw_key();
        match self.random.range(0, 4) {
            0 | 1 => self.end_session(&key),
            2 => self.rewind_session(&key),
            3 => self.fork_session(&key),
            _ => self.import_session(&key),
        }
    }

    /// Settles what is no turn of the model, once it is written down where something is.
    fn settle(&mut self, turn: FinishedTurn) -> Result<()> {
        if let Some(journal) = &mut self.journal {
            return journal.write(&self.store, turn, self.now_ms);
        }
        turn.commit(self.now_ms);
        Ok(())
    }

    fn next_request(&mut self) -> u64 {
        self.next_request += 1;
        self.next_request - 1
    }

    pub(super) fn end_session(&mut self, key: &SessionKey) -> Check {
        let request = self.next_request();
        self.ledger.expire(self.now_ms);
        let end = TurnGuard::begin_end(&self.store, key.clone(), request, self.now_ms);
        let expected = match self.ledger.sessions.get(key) {
            None => Ok(false),
            Some(session) if session.running.is_some() => Err("session_busy"),
            Some(_) => Ok(true),
        };
        let begun = end.as_ref().map(Option::is_some).map_err(|e| e.code);
        ensure(begun == expected, || {
            format!("ending {key:?}: {begun:?}, not {expected:?}")
        })?;
        if let Ok(Some(end)) = end
            && self.settle(end).is_ok()
        {
            self.ledger.end(key);
        }
        Ok(())
    }

    fn rewind_session(&mut self, key: &SessionKey) -> Check {
        let (request, turns) = (self.next_request(), self.random.range(0, 4));
        self.ledger.expire(self.now_ms);
        let expected = match self.ledger.sessions.get(key) {
            None => Err(404),
            Some(session) if session.running.is_some() => Err(409),
            Some(session) if turns == 0 || turns > session.turns.len() => Err(400),
            Some(session) => Ok(session.clone()),
        };
        let begun = TurnGuard::begin(&self.store, key.clone(), request, Start::Mend, self.now_ms);
        let rewound =
            begun.and_then(|(lease, base)| Ok(lease.finish(base.after_turns(Some(turns))?)));
        self.take_verb(key, turns, rewound, expected)
    }

    fn fork_session(&mut self, key: &SessionKey) -> Check {
        let (request, turns) = (self.next_request(), self.random.range(0, 4));
        self.ledger.expire(self.now_ms);
        let id = self.draw_key().id;
        let fork = SessionKey::new(key.tenant, id);
        let store = Arc::clone(&self.store);
        let mut sessions = store.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.expire(self.now_ms);
        let commit = sessions
            .state(key)
            .and_then(|state| state.base().after_turns(Some(turns)));
        drop(sessions);
        let expected = match self.ledger.sessions.get(key) {
            None => Err(404),
            Some(source) if turns == 0 || turns > source.turns.len() => Err(400),
            Some(_) if self.ledger.sessions.contains_key(&fork) => Err(409),
            Some(source) => Ok(source.clone()),
        };
        let forked = commit.and_then(|commit| {
            let begun = TurnGuard::begin(&store, fork.clone(), request, Start::New, self.now_ms);
            begun.map(|(lease, _)| lease.finish(commit))
        });
        if expected.is_ok() {
            self.ledger.reserve(fork.clone(), request);
        }
        self.take_verb(&fork, turns, forked, expected)
    }

    /// What a server exports of a session becomes one of whoever imports it; a body that is damaged becomes nothing.
    fn import_session(&mut self, key: &SessionKey) -> Check {
        let (request, copy) = (self.next_request(), self.draw_key());
        self.ledger.expire(self.now_ms);
        let store = Arc::clone(&self.store);
        let mut sessions = store.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.expire(self.now_ms);
        let exported = sessions.state(key).cloned();
        drop(sessions);
        let Some(source) = self.ledger.sessions.get(key).cloned() else {
            return ensure(exported.is_err(), || format!("{key:?} is exported"));
        };
        let state = exported.map_err(|error| error.message)?;
        let mut parts: Vec<_> = state
            .turns
            .iter()
            .map(|turn| (turn.input_tokens, turn.output_tokens, turn.tail, None))
            .collect();
        let damaged = parts.is_empty() || self.random.once_in(3);
        if let Some(last) = parts.last_mut().filter(|_| damaged) {
            last.1 = [usize::MAX, last.1 + 1][self.random.range(0, 1)];
        }
        let commit = Commit::of_turns(
            state.tokens.to_vec(),
            parts,
            state.seed,
            state.system_tokens,
        );
        let commit = match commit {
            Ok(commit) if !damaged => commit,
            Err(error) if damaged && error.kind.status() == 400 => return Ok(()),
            commit => return Err(format!("{state:?} is imported as {commit:?}")),
        };
        self.counters.imports += 1;
        let expected = if self.ledger.sessions.contains_key(&copy) {
            Err(409)
        } else {
            Ok(source)
        };
        let begun = TurnGuard::begin(&store, copy.clone(), request, Start::New, self.now_ms);
        let imported = begun.map(|(lease, _)| lease.finish(commit));
        if expected.is_ok() {
            self.ledger.reserve(copy.clone(), request);
        }
        self.take_verb(&copy, state.turns.len(), imported, expected)
    }

    /// Settles a verb that leaves the first `turns` turns of `expected` in `key`, or holds its refusal to the right status.
    fn take_verb(
        &mut self,
        key: &SessionKey,
        turns: usize,
        turn: Result<FinishedTurn>,
        expected: std::result::Result<Session, u16>,
    ) -> Check {
        match (turn, expected) {
            (Ok(turn), Ok(session)) => {
                if self.settle(turn).is_ok() {
                    let ends = &session.turns[..turns];
                    let tokens = &session.tokens[..ends[turns - 1]];
                    self.ledger.put(key.clone(), tokens, ends, self.now_ms);
                } else {
                    self.ledger.release(key);
                }
                Ok(())
            }
            (Err(error), Err(status)) if error.kind.status() == status => Ok(()),
            (turn, expected) => {
                let turn = turn.map_err(|error| error.message);
                Err(format!("a verb on {key:?}: {turn:?}, not {expected:?}"))
            }
        }
    }
}
