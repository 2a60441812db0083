//! A request's place among the open ones, owned: dropping it gives the place, and what it reserved, back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::core::Abort;
use super::shared::Shared;
use crate::error::{Error, Kind, Result};
use crate::wire::Usage;

pub(super) type AbortFlag = Arc<Mutex<Option<Abort>>>;

/// The requests that have not ended.
#[derive(Debug, Default)]
pub(super) struct OpenRequests {
    pub(super) flags: HashMap<u64, AbortFlag>,
    /// Sequences they may make.
    pub(super) choices: usize,
}

/// What a request takes of its tenant's allowance.
#[derive(Debug, Clone, Copy, Default)]
struct Account {
    reserved: usize,
    /// Tokens it brought in, once they are known.
    input: usize,
    output: usize,
    counted: bool,
    started: bool,
}

/// What became of a request so far, for whoever logs it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RequestRecord {
    /// Tokens that the model saw; 0 until its first choice ends.
    pub prompt_tokens: usize,
    /// Of these, those that were not computed again.
    pub cached_tokens: usize,
    /// Tokens of the choices that have ended.
    pub completion_tokens: usize,
    /// From its arrival to its first step.
    pub queued: Option<Duration>,
    /// From its arrival to its first token.
    pub first_token: Option<Duration>,
}

/// A record that the engine writes and a stream's reader reads.
pub(super) type SharedRecord = Arc<Mutex<RequestRecord>>;

/// A request's place among the open ones.
#[derive(Debug)]
pub(super) struct OpenRequest {
    shared: Arc<Shared>,
    id: u64,
    tenant: u32,
    choices: usize,
    flag: AbortFlag,
    arrived: Instant,
    account: Account,
    record: SharedRecord,
    /// When the first choice's last token was sampled.
    last_token: Option<Instant>,
}

impl OpenRequest {
    /// Opens a request of `choices` sequences.
    ///
    /// # Errors
    /// 429 `queue_full` or `rate_limit_exceeded`.
    pub(super) fn new(shared: &Arc<Shared>, tenant: u32, choices: usize) -> Result<Self> {
        let (mut open, limit) = (shared.requests(), shared.max_open);
        if open.choices + choices > limit {
            let message = format!(
                "{} answers are being made or wait, the limit is {limit}, and {choices} more were asked for",
                open.choices
            );
            return Err(Error::new(Kind::Busy, "queue_full", message).with_detail("retry_after", 1));
        }
        shared.accounts().open(tenant, shared.uptime_ms())?;
        let id = shared.next_id();
        let flag = AbortFlag::default();
        open.choices += choices;
        open.flags.insert(id, Arc::clone(&flag));
        Ok(Self {
            shared: Arc::clone(shared),
            id,
            tenant,
            choices,
            flag,
            arrived: Instant::now(),
            account: Account::default(),
            record: SharedRecord::default(),
            last_token: None,
        })
    }

    pub(super) const fn id(&self) -> u64 {
        self.id
    }

    /// When it came in.
    pub(super) const fn arrived(&self) -> Instant {
        self.arrived
    }

    /// Where its record is kept.
    pub(super) fn record(&self) -> SharedRecord {
        Arc::clone(&self.record)
    }

    fn note(&self, note: impl FnOnce(&mut RequestRecord)) {
        note(&mut self.record.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A token of its first choice was sampled. Returns the time since the one before; none for the first.
    pub(super) fn sampled(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let before = self.last_token.replace(now);
        if before.is_none() {
            self.note(|record| record.first_token = Some(now - self.arrived));
        }
        before.map(|before| now - before)
    }

    pub(super) fn aborted(&self) -> Option<Abort> {
        *self.flag.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `input` tokens, and up to `output` more that it asks for, off its tenant's minute.
    ///
    /// # Errors
    /// 429 `rate_limit_exceeded`, 400 `exceeds_tokens_per_minute`.
    pub(super) fn reserve(&mut self, input: usize, output: usize) -> Result<()> {
        let (shared, tokens) = (&self.shared, input + output);
        shared
            .accounts()
            .reserve(self.tenant, tokens, shared.uptime_ms())?;
        self.account.reserved = tokens;
        self.account.input = input;
        Ok(())
    }

    /// Something of it is being computed; true for the first time.
    pub(super) fn start(&mut self) -> bool {
        let first = !self.account.started;
        if first {
            self.account.started = true;
            self.note(|record| record.queued = Some(self.arrived.elapsed()));
            self.shared.accounts().start(self.tenant);
        }
        first
    }

    /// Counts what one of its choices has used, when that ends; nothing, if nothing was computed. The prompt is the first
    /// choice's: the others find it computed.
    pub(super) fn count(&mut self, choice: usize, usage: Usage) {
        if !self.account.started {
            return;
        }
        let first = choice == 0 && !self.account.counted;
        let mut accounts = self.shared.accounts();
        if first {
            self.account.counted = true;
            accounts.count_request(self.tenant, usage.prompt_tokens, usage.cached_tokens);
        }
        accounts.count_output(self.tenant, usage.completion_tokens);
        drop(accounts);
        self.account.output += usage.completion_tokens;
        if first {
            self.shared.latencies().prompt(usage.prompt_tokens);
        }
        self.note(|record| {
            if first {
                record.prompt_tokens = usage.prompt_tokens;
                record.cached_tokens = usage.cached_tokens;
            }
            record.completion_tokens += usage.completion_tokens;
        });
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        let account = self.account;
        // A request that never began has used none.
        let used = if account.counted {
            account.input + account.output
        } else {
            0
        };
        self.shared.accounts().close(
            self.tenant,
            account.reserved,
            used,
            account.started,
            self.shared.uptime_ms(),
        );
        let mut open = self.shared.requests();
        open.flags.remove(&self.id);
        open.choices -= self.choices;
        drop(open);
        self.shared.closed.notify_all();
    }
}
