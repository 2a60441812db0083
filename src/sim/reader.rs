//! The clients' side of the wire: replies that are written by the core's own code and read as slowly as a client likes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::check::{Check, ensure};
use super::journal::Journal;
use super::ledger::Ledger;
use super::random::Random;
use crate::engine::{Events, FinishedTurn};
use crate::error::{Error, Result};
use crate::request::Submission;
use crate::sched::FinishReason;
use crate::session::SessionStore;
use crate::text::Tokenizer;
use crate::wire::{Delta, Mailbox, Poll, ReadLimits, Reply, Usage, Wake};

/// What a whole reply must say.
#[derive(Debug)]
struct Outcome {
    text: String,
    tokens: usize,
    reason: &'static str,
}

/// One client's connection.
#[derive(Debug)]
struct Reader {
    mailbox: Arc<Mailbox>,
    bytes: Vec<u8>,
    /// The client looks once in that many steps.
    pace: usize,
    /// The reply has more than one answer, and the frames do not tell them apart.
    many: bool,
    /// It was too far behind, and its stream has ended.
    cut: bool,
    outcome: Option<Outcome>,
}

impl Reader {
    fn check(&self) -> Check {
        if self.many {
            return Ok(());
        }
        let Some(outcome) = &self.outcome else {
            return Err("a reply ended before its request".into());
        };
        let mut text = String::new();
        let mut last = Value::Null;
        let frames = self.bytes.split(|&byte| byte == 0);
        for frame in frames.filter(|frame| !frame.is_empty()) {
            last = serde_json::from_slice(frame).map_err(|e| format!("a frame is no JSON: {e}"))?;
            text.push_str(last["text"].as_str().unwrap_or_default());
        }
        if self.cut {
            let told =
                last["error"]["code"] == "reader_too_slow" && outcome.text.starts_with(&text);
            return ensure(told, || {
                format!("a slow reader is told {text:?} {last} of {outcome:?}")
            });
        }
        let same = last["finish_reason"] == outcome.reason
            && last["tokens"] == outcome.tokens
            && text == outcome.text;
        ensure(same, || {
            format!("the wire says {text:?} {last}, not {outcome:?}")
        })?;
        let completion = &last["usage"]["completion_tokens"];
        ensure(*completion == outcome.tokens, || format!("usage of {last}"))
    }
}

/// All replies: those being written and those being read.
#[derive(Debug)]
pub(super) struct Replies {
    wake: Arc<Wake>,
    limits: ReadLimits,
    open: BTreeMap<u64, Reply>,
    readers: BTreeMap<u64, Reader>,
    /// Requests that are to be aborted: their readers are too far behind.
    pub(super) too_slow: Vec<u64>,
    /// FNV-1a over everything that clients were sent, in the order in which they read it.
    pub(super) digest: u64,
}

impl Replies {
    pub(super) fn new(limits: ReadLimits, digest: u64) -> Result<Self, String> {
        Ok(Self {
            wake: Arc::new(Wake::new().map_err(|e| e.message)?),
            limits,
            open: BTreeMap::new(),
            readers: BTreeMap::new(),
            too_slow: Vec::new(),
            digest,
        })
    }

    pub(super) fn open(
        &mut self,
        request: u64,
        submission: &Submission,
        pace: usize,
    ) -> Result<(), String> {
        let mailbox = Mailbox::with_limits(request, Arc::clone(&self.wake), self.limits);
        let reply = Reply::new(submission, Arc::clone(&mailbox)).map_err(|e| e.message)?;
        self.open.insert(request, reply);
        let reader = Reader {
            mailbox,
            bytes: Vec::new(),
            pace,
            many: submission.n > 1,
            cut: false,
            outcome: None,
        };
        self.readers.insert(request, reader);
        Ok(())
    }

    pub(super) fn accept(&mut self, request: u64, prompt_tokens: usize, history_tokens: usize) {
        if let Some(reply) = self.open.get_mut(&request) {
            reply.accept(prompt_tokens, history_tokens);
        }
    }

    fn push(&mut self, request: u64, choice: usize, delta: Delta) {
        if let Some(reply) = self.open.get_mut(&request)
            && !reply.push(choice, delta)
        {
            self.too_slow.push(request);
            if let Some(reader) = self.readers.get_mut(&request) {
                reader.cut = true;
            }
        }
    }

    pub(super) fn fail(&mut self, request: u64, error: Error) {
        if let Some(mut reply) = self.open.remove(&request) {
            reply.fail(error);
        }
        // What a failed reply has sent so far is compared as far as the events went; its last frame is the error's.
        if let Some(reader) = self.readers.get_mut(&request) {
            reader.many = true;
        }
    }

    /// The client hangs up and reads no more.
    pub(super) fn leave(&mut self, request: u64) {
        self.readers.remove(&request);
    }

    pub(super) fn are_read(&self) -> bool {
        self.readers.is_empty() && self.open.is_empty()
    }

    fn note(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.digest = (self.digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Lets the clients read.
    pub(super) fn read(&mut self, random: &mut Random) -> Check {
        self.wake.signal();
        let mut ended = Vec::new();
        let mut news = Vec::new();
        for (&request, reader) in &mut self.readers {
            if !random.once_in(reader.pace) {
                continue;
            }
            match reader.mailbox.poll() {
                Poll::Waiting => {}
                Poll::Accepted(bytes) => {
                    news.extend_from_slice(&bytes);
                    reader.bytes.extend(bytes);
                }
                Poll::Ended(bytes) => {
                    news.extend_from_slice(&bytes);
                    reader.bytes.extend(bytes);
                    reader.check()?;
                    ended.push(request);
                }
                Poll::Failed(error) => {
                    news.extend_from_slice(error.message.as_bytes());
                    ended.push(request);
                }
            }
        }
        self.note(&news);
        for request in ended {
            self.readers.remove(&request);
        }
        Ok(())
    }
}

/// Passes the core's events on to the ledger and to the replies.
pub(super) struct Observer<'a> {
    pub(super) store: &'a Mutex<SessionStore>,
    pub(super) journal: Option<&'a mut Journal>,
    pub(super) ledger: &'a mut Ledger,
    pub(super) replies: &'a mut Replies,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) now_ms: u64,
    pub(super) outcome: Check,
}

impl Observer<'_> {
    fn add_text(&mut self, request: u64, choice: usize, delta: &Delta) -> Check {
        let open = self.ledger.open.get_mut(&request);
        let Some(open) = open.filter(|open| open.admitted) else {
            return Err("a request that is not open has news".into());
        };
        let answer = &mut open.answers[choice];
        answer.text.push_str(&delta.text);
        // A step may give several tokens, which are told one by one.
        let (last, count) = (answer.told, answer.tokens.len());
        answer.told = delta.tokens;
        ensure((last..=count).contains(&delta.tokens), || {
            format!("{} tokens told after {last}, {count} emitted", delta.tokens)
        })
    }

    /// Commits a turn, once it is written down where something is.
    fn settle(&mut self, turn: FinishedTurn) -> Result<()> {
        if let Some(journal) = &mut self.journal {
            return journal.write(self.store, turn, self.now_ms);
        }
        turn.commit(self.now_ms);
        Ok(())
    }

    /// Holds the usage of a request that fails to the tokens of its open answers.
    fn check_usage(&self, request: u64, usage: Usage) -> Check {
        let emitted = self.ledger.open_tokens(request);
        let told = usage.completion_tokens;
        ensure(told == emitted, || {
            format!("a failed request used {told} tokens, but {emitted} were emitted")
        })
    }

    fn book(&mut self, outcome: Check) {
        if self.outcome.is_ok() {
            self.outcome = outcome;
        }
    }
}

impl Events for Observer<'_> {
    fn delta(&mut self, request: u64, choice: usize, delta: Delta) {
        let outcome = self.add_text(request, choice, &delta);
        self.book(outcome);
        self.replies.push(request, choice, delta);
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
        // Whatever becomes of its session.
        self.ledger
            .keep_in_lane(request, &delta.text, reason, self.tokenizer);
        if let Some(turn) = turn
            && let Err(error) = self.settle(turn)
        {
            // The session is as it was, and the client hears of it.
            let outcome = self.check_usage(request, usage);
            let outcome = outcome.and_then(|()| self.ledger.fail(request));
            self.book(outcome);
            self.replies.fail(request, error);
            return;
        }
        let outcome = self.add_text(request, choice, &delta).and_then(|()| {
            if let Some(reader) = self.replies.readers.get_mut(&request) {
                let answer = &self.ledger.open[&request].answers[choice];
                reader.outcome = Some(Outcome {
                    text: answer.text.clone(),
                    tokens: answer.tokens.len(),
                    reason: reason.as_str(),
                });
            }
            self.ledger
                .finish(request, choice, reason, usage, self.now_ms, self.tokenizer)
        });
        self.book(outcome);
        if let Some(reply) = self.replies.open.get_mut(&request)
            && reply.finish(choice, delta, reason, usage)
        {
            self.replies.open.remove(&request);
        }
    }

    fn fail(&mut self, request: u64, error: &Error, usage: Usage) {
        let outcome = self.check_usage(request, usage);
        let outcome = outcome.and_then(|()| self.ledger.give_up(request, error.code));
        self.book(outcome);
        self.replies.fail(request, error.clone());
    }
}
