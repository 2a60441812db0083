//! What every request and session must come to, kept as simply as can be and compared with what the core does.

use std::collections::{BTreeMap, BTreeSet};

use super::check::{Check, ensure};
use super::lane_book::LaneBook;
use super::open::{Fault, Open};
use super::records::{Known, Session};
use super::vocabulary::Message;
use crate::engine::Abort;
use crate::request::{OnDisconnect, SessionRef};
use crate::sched::FinishReason;
use crate::session::{SessionKey, StoreLimits};
use crate::text::Tokenizer;
use crate::wire::Usage;

/// What became of a request whose answer somebody wants to write down.
#[derive(Debug)]
pub(super) enum Told {
    NotYet,
    /// It failed, or its server died.
    Nothing,
    /// All tokens, with its prompt.
    All(Vec<u32>),
}

/// All open requests and all sessions.
#[derive(Debug)]
pub(super) struct Ledger {
    pub(super) open: BTreeMap<u64, Open>,
    pub(super) sessions: BTreeMap<SessionKey, Session>,
    /// Ids whose session was evicted or is lost, and which nobody has begun anew or ended since.
    pub(super) gone: BTreeSet<SessionKey>,
    pub(super) limits: StoreLimits,
    /// The only request of a step that failed by no fault of it.
    pub(super) alone: Option<u64>,
    /// The answer whose mask panicked in this step: its request, and its place in that.
    pub(super) unmasked: Option<(u64, usize)>,
    /// The whole answers that somebody wants to write down: all tokens of the first, with its prompt, once it has ended.
    pub(super) told: BTreeMap<u64, Option<Vec<u32>>>,
    /// What was said in lanes.
    pub(super) book: LaneBook,
    commits: u64,
}

impl Ledger {
    pub(super) const fn new(limits: StoreLimits) -> Self {
        Self {
            open: BTreeMap::new(),
            sessions: BTreeMap::new(),
            gone: BTreeSet::new(),
            limits,
            alone: None,
            unmasked: None,
            told: BTreeMap::new(),
            book: LaneBook::new(),
            commits: 0,
        }
    }

    /// What a server begins with whose log brings these sessions back.
    pub(super) fn restored(limits: StoreLimits, known: Known, now_ms: u64) -> Self {
        // Each number is at most the store's own of that use, so what comes later is always above it.
        let used = known.sessions.values().map(|session| session.used_order);
        let mut ledger = Self {
            commits: used.max().unwrap_or(0),
            sessions: known.sessions,
            gone: known.gone,
            ..Self::new(limits)
        };
        ledger.expire(now_ms);
        ledger.evict();
        ledger
    }

    /// The sessions at their last committed turns.
    pub(super) fn committed(&self) -> Known {
        let sessions = self.sessions.iter();
        let committed = sessions.filter(|(_, session)| !session.turns.is_empty());
        let idle = |session: &Session| Session {
            running: None,
            ..session.clone()
        };
        Known {
            sessions: committed.map(|(key, s)| (key.clone(), idle(s))).collect(),
            gone: self.gone.clone(),
            damaged: None,
        }
    }

    /// Makes a session what a verb has made of it.
    pub(super) fn put(&mut self, key: SessionKey, tokens: &[u32], turns: &[usize], now_ms: u64) {
        self.commits += 1;
        let session = Session {
            tokens: tokens.to_vec(),
            turns: turns.to_vec(),
            running: None,
            lost_turn: 0,
            used_ms: now_ms,
            used_order: self.commits,
        };
        self.gone.remove(&key);
        self.sessions.insert(key, session);
        self.evict();
    }

    /// What a turn of a session builds on: its tokens and where its turns end, or the status of the refusal.
    pub(super) fn begin(
        &mut self,
        key: &SessionKey,
        turn: &SessionRef,
        request: u64,
        now_ms: u64,
    ) -> Result<(Vec<u32>, Vec<usize>), u16> {
        self.expire(now_ms);
        if let Some(parent) = &turn.parent {
            let parent = SessionKey::new(key.tenant, parent.clone());
            let parent = self.sessions.get(&parent).ok_or(404_u16)?.clone();
            let begins = parent.turns.is_empty() || parent.lost_turn > 0;
            if begins || self.sessions.contains_key(key) {
                return Err(409);
            }
            self.reserve(key.clone(), request);
            return Ok((parent.tokens, parent.turns));
        }
        let may_begin = turn.start || (turn.create && !self.gone.contains(key));
        if !self.sessions.contains_key(key) && !may_begin {
            return Err(404);
        }
        let session = self.sessions.entry(key.clone()).or_default();
        if session.running.is_some() || (session.lost_turn > 0 && !turn.start) {
            return Err(409);
        }
        session.running = Some(request);
        let base = if turn.start {
            Default::default()
        } else {
            (session.tokens.clone(), session.turns.clone())
        };
        self.evict();
        Ok(base)
    }

    /// A session that is being made.
    pub(super) fn reserve(&mut self, key: SessionKey, request: u64) {
        let running = Some(request);
        self.sessions.insert(
            key,
            Session {
                running,
                ..Session::default()
            },
        );
        self.evict();
    }

    /// A verb could not be written down.
    pub(super) fn release(&mut self, key: &SessionKey) {
        if let Some(session) = self.sessions.get_mut(key) {
            session.running = None;
            if session.turns.is_empty() {
                self.sessions.remove(key);
            }
        }
        self.evict();
    }

    /// A session's client has ended it.
    pub(super) fn end(&mut self, key: &SessionKey) {
        self.sessions.remove(key);
        self.gone.remove(key);
    }

    pub(super) fn expire(&mut self, now_ms: u64) {
        let ttl_ms = self.limits.ttl_ms;
        if ttl_ms > 0 {
            let old = |s: &Session| s.running.is_none() && s.used_ms + ttl_ms <= now_ms;
            let gone = self.sessions.iter().filter(|(_, s)| old(s));
            self.gone.extend(gone.map(|(key, _)| key.clone()));
            self.sessions.retain(|_, s| !old(s));
        }
    }

    pub(super) fn evict(&mut self) {
        while self.sessions.len() > self.limits.max_sessions {
            let idle = self.sessions.iter().filter(|(_, s)| s.running.is_none());
            let Some((_, key)) = idle.map(|(key, s)| (s.used_order, key.clone())).min() else {
                return;
            };
            self.sessions.remove(&key);
            self.gone.insert(key);
        }
    }

    /// Leaves a request's session as it was.
    pub(super) fn roll_back(&mut self, open: &Open) {
        if let Some((key, _)) = &open.session {
            self.release(key);
        }
    }

    /// Books the end of a choice; the request has ended with its last one.
    pub(super) fn finish(
        &mut self,
        request: u64,
        choice: usize,
        reason: FinishReason,
        usage: Usage,
        now_ms: u64,
        tokenizer: &Tokenizer,
    ) -> Check {
        let Some(open) = self.open.get_mut(&request).filter(|open| open.admitted) else {
            return Err("a request that is not open ended".into());
        };
        ensure(!open.answers[choice].ended, || "ended twice".into())?;
        open.answers[choice].ended = true;
        open.check_end(choice, reason, usage, tokenizer)?;
        if open.answers.iter().any(|answer| !answer.ended) {
            return Ok(());
        }
        let Some(open) = self.open.remove(&request) else {
            return Ok(());
        };
        let answer = &open.answers[0];
        if reason != FinishReason::Abort {
            self.book.hear(request, &answer.text);
        }
        let Some((key, turn)) = &open.session else {
            if reason != FinishReason::Abort {
                self.tell(request, &[&open.prompt[..], &answer.tokens].concat());
            }
            return Ok(());
        };
        let kept = match open.aborted.filter(|_| reason == FinishReason::Abort) {
            None => true,
            Some(how) => {
                let keeps = how == Abort::Cancel || turn.on_disconnect == OnDisconnect::Keep;
                keeps && !answer.tokens.is_empty()
            }
        };
        if !kept {
            self.roll_back(&open);
            return Ok(());
        }
        if turn.end {
            self.end(key);
            return Ok(());
        }
        let tokens = open.kept_tokens(reason);
        self.tell(request, &tokens);
        let mut turns = open.turns.clone();
        if tokens.len() > turns.last().copied().unwrap_or(0) {
            turns.push(tokens.len());
        }
        self.put(key.clone(), &tokens, &turns, now_ms);
        Ok(())
    }

    /// Books the end of an answer in its lane. `last`: the end of its text.
    pub(super) fn keep_in_lane(
        &mut self,
        request: u64,
        last: &str,
        reason: FinishReason,
        tokenizer: &Tokenizer,
    ) {
        let Some(open) = self.open.get_mut(&request) else {
            return;
        };
        let Some(lane) = open.lane.take() else { return };
        if reason == FinishReason::Abort || open.is_cut(reason, tokenizer) {
            return;
        }
        let branches = open
            .session
            .as_ref()
            .is_some_and(|(_, turn)| turn.parent.is_some());
        self.book.kept_responses += u64::from(branches);
        let tokens = open.kept_tokens(reason);
        let answer = Message {
            is_answer: true,
            text: format!("{}{last}", open.answers[0].text),
        };
        let turns = [&open.turns[..], &[tokens.len()]].concat();
        self.book.keep(lane, &answer, &tokens, &turns);
    }

    fn tell(&mut self, request: u64, tokens: &[u32]) {
        if let Some(told) = self.told.get_mut(&request) {
            *told = Some(tokens.to_vec());
        }
    }

    /// What became of a request that is in `told`.
    pub(super) fn take_told(&mut self, request: u64) -> Told {
        if self.open.contains_key(&request) {
            return Told::NotYet;
        }
        let told = self.told.remove(&request).flatten();
        told.map_or(Told::Nothing, Told::All)
    }

    /// Tokens of the request's answers that have not ended.
    pub(super) fn open_tokens(&self, request: u64) -> usize {
        let answers = self
            .open
            .get(&request)
            .into_iter()
            .flat_map(|open| &open.answers);
        let open = answers.filter(|answer| !answer.ended);
        open.map(|answer| answer.tokens.len()).sum()
    }

    /// Books that the core gave a request up, which it may do to those alone that have a fault, had no mask, or were alone in a step
    /// that failed.
    pub(super) fn give_up(&mut self, request: u64, code: &str) -> Check {
        let fault = self.open.get(&request).and_then(|open| open.fault);
        let unmasked = self.unmasked.map(|(request, _)| request);
        let by_chance = [self.alone, unmasked].contains(&Some(request)) && code == "internal_error";
        ensure(by_chance || fault.map(Fault::code) == Some(code), || {
            format!("a request with the fault {fault:?} was given up with {code}")
        })?;
        self.fail(request)
    }

    /// Books the failure of a request.
    pub(super) fn fail(&mut self, request: u64) -> Check {
        let Some(open) = self.open.remove(&request) else {
            return Err("a request that is not open failed".into());
        };
        self.roll_back(&open);
        Ok(())
    }

    /// Answers that the core must know of.
    pub(super) fn admitted_answers(&self) -> usize {
        let admitted = self.open.values().filter(|open| open.admitted);
        let answers = admitted.flat_map(|open| &open.answers);
        answers.filter(|answer| !answer.ended).count()
    }
}
