//! A request's place among the open ones. Dropping it releases the place and what the request has reserved.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::adapters::AdapterUse;
use super::events::Abort;
use super::locks::lock;
use super::metrics::Latencies;
use crate::error::{Error, Kind, Result};
use crate::tenant::{Accounts, Closed};
use crate::wire::Usage;

pub(super) type AbortFlag = Arc<Mutex<Option<Abort>>>;

/// What a request takes from its tenant's allowance.
#[derive(Debug, Clone, Copy, Default)]
struct Account {
    reserved: usize,
    /// Number of its input tokens, once it is known.
    input: usize,
    output: usize,
    counted: bool,
    started: bool,
}

/// The record of a request, for the request log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RequestRecord {
    /// Number of prompt tokens; 0 until its first choice ends.
    pub prompt_tokens: usize,
    /// Number of prompt tokens that came from the KV cache.
    pub cached_tokens: usize,
    /// Number of tokens of the choices that have ended.
    pub completion_tokens: usize,
    /// Time from its arrival to its first step.
    pub queued: Option<Duration>,
    /// Time from its arrival to its first token.
    pub first_token: Option<Duration>,
}

/// A record that the engine writes and a stream's reader reads.
pub(super) type SharedRecord = Arc<Mutex<RequestRecord>>;

/// The requests that have not ended.
#[derive(Debug, Default)]
struct Open {
    flags: HashMap<u64, AbortFlag>,
    /// Number of sequences that they may create.
    choices: usize,
}

/// Decides which requests are admitted: the open requests, and the allowance of each tenant.
#[derive(Debug)]
pub(super) struct Admissions {
    open: Mutex<Open>,
    /// A request has ended.
    ended: Condvar,
    /// Maximum number of open sequences.
    max_open: usize,
    accounts: Mutex<Accounts>,
    latencies: Mutex<Latencies>,
    started: Instant,
    /// Refuses new requests.
    draining: AtomicBool,
    next_id: AtomicU64,
}

/// A request's place among the open ones.
#[derive(Debug)]
pub(super) struct Admission {
    admissions: Arc<Admissions>,
    id: u64,
    tenant: u32,
    choices: usize,
    background: bool,
    flag: AbortFlag,
    arrived: Instant,
    account: Account,
    record: SharedRecord,
    /// When the first choice's last token was sampled.
    last_token: Option<Instant>,
    /// Kept until the request ends.
    adapter: Option<AdapterUse>,
}

impl Admissions {
    pub(super) fn new(max_open: usize, accounts: Accounts) -> Self {
        Self {
            open: Mutex::default(),
            ended: Condvar::new(),
            max_open,
            accounts: Mutex::new(accounts),
            latencies: Mutex::default(),
            started: Instant::now(),
            draining: AtomicBool::new(false),
            next_id: AtomicU64::new(1),
        }
    }

    /// Admits a request of `choices` sequences.
    ///
    /// # Errors
    /// 429 `queue_full` or `rate_limit_exceeded`, 503 `draining`.
    pub(super) fn admit(
        self: &Arc<Self>,
        tenant: u32,
        choices: usize,
        background: bool,
    ) -> Result<Admission> {
        if self.draining.load(Ordering::Acquire) {
            let message = "the server is shutting down and takes no new requests";
            return Err(
                Error::new(Kind::Unavailable, "draining", message).with_detail("retry_after", 5)
            );
        }
        let (mut open, limit) = (lock(&self.open), self.max_open);
        if open.choices + choices > limit {
            let message = format!(
                "{} answers are running or waiting, the limit is {limit}, and {choices} more were requested",
                open.choices
            );
            return Err(Error::new(Kind::Busy, "queue_full", message).with_detail("retry_after", 1));
        }
        self.accounts().open(tenant, background, self.uptime_ms())?;
        let id = self.next_id();
        let flag = AbortFlag::default();
        open.choices += choices;
        open.flags.insert(id, Arc::clone(&flag));
        Ok(Admission {
            admissions: Arc::clone(self),
            id,
            tenant,
            choices,
            background,
            flag,
            arrived: Instant::now(),
            account: Account::default(),
            record: SharedRecord::default(),
            last_token: None,
            adapter: None,
        })
    }

    pub(super) fn accounts(&self) -> MutexGuard<'_, Accounts> {
        lock(&self.accounts)
    }

    pub(super) fn latencies(&self) -> MutexGuard<'_, Latencies> {
        lock(&self.latencies)
    }

    /// Milliseconds since the engine's start, by a clock that never goes back.
    pub(super) fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// A number that no request has.
    pub(super) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Requests that have not ended.
    pub(super) fn len(&self) -> usize {
        lock(&self.open).flags.len()
    }

    /// Records that a request must end early. The first call decides how. Returns false if it has ended.
    pub(super) fn abort(&self, request: u64, how: Abort) -> bool {
        let Some(flag) = lock(&self.open).flags.get(&request).cloned() else {
            return false;
        };
        lock(&flag).get_or_insert(how);
        true
    }

    /// Refuses new requests and waits up to `grace` for those that are open.
    pub(super) fn drain(&self, grace: Duration) {
        self.draining.store(true, Ordering::Release);
        let deadline = Instant::now() + grace;
        let mut open = lock(&self.open);
        while open.choices > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            open = self
                .ended
                .wait_timeout(open, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until a request, and before it its session's turn, has ended.
    pub(super) fn wait_for(&self, request: u64) {
        let mut open = lock(&self.open);
        while open.flags.contains_key(&request) {
            open = self
                .ended
                .wait(open)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Admission {
    pub(super) const fn id(&self) -> u64 {
        self.id
    }

    /// Keeps the request's adapter loaded until it ends.
    pub(super) fn keep(&mut self, adapter: Option<AdapterUse>) {
        self.adapter = adapter;
    }

    /// Time since its arrival.
    pub(super) fn age(&self) -> Duration {
        self.arrived.elapsed()
    }

    /// Its record.
    pub(super) fn record(&self) -> SharedRecord {
        Arc::clone(&self.record)
    }

    fn note(&self, note: impl FnOnce(&mut RequestRecord)) {
        note(&mut lock(&self.record));
    }

    /// Records that a token of its first choice was sampled. Returns the time since the previous one; none for the first.
    pub(super) fn sampled(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let before = self.last_token.replace(now);
        if before.is_none() {
            self.note(|record| record.first_token = Some(now - self.arrived));
        }
        before.map(|before| now - before)
    }

    pub(super) fn aborted(&self) -> Option<Abort> {
        *lock(&self.flag)
    }

    /// Takes `input` tokens, and up to `output` requested ones, from its tenant's tokens per minute.
    ///
    /// # Errors
    /// 429 `rate_limit_exceeded`, 400 `exceeds_tokens_per_minute`.
    pub(super) fn reserve(&mut self, input: usize, output: usize) -> Result<()> {
        let (admissions, tokens) = (&self.admissions, input + output);
        admissions
            .accounts()
            .reserve(self.tenant, tokens, admissions.uptime_ms())?;
        self.account.reserved = tokens;
        self.account.input = input;
        Ok(())
    }

    /// Records that the request is being computed. Returns true the first time.
    pub(super) fn start(&mut self) -> bool {
        let first = !self.account.started;
        if first {
            self.account.started = true;
            self.note(|record| record.queued = Some(self.arrived.elapsed()));
            self.admissions.accounts().start(self.tenant);
        }
        first
    }

    /// Counts what one of its choices has used, when the choice ends; nothing if nothing was computed. The prompt is counted for the
    /// first choice, because the others find it in the cache.
    pub(super) fn count(&mut self, choice: usize, usage: Usage) {
        if !self.account.started {
            return;
        }
        let first = choice == 0 && !self.account.counted;
        let mut accounts = self.admissions.accounts();
        if first {
            self.account.counted = true;
            accounts.count_request(self.tenant, usage.prompt_tokens, usage.cached_tokens);
        }
        accounts.count_output(self.tenant, usage.completion_tokens);
        drop(accounts);
        self.account.output += usage.completion_tokens;
        if first {
            self.admissions.latencies().prompt(usage.prompt_tokens);
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

impl Drop for Admission {
    fn drop(&mut self) {
        let account = self.account;
        // A request that never began has used nothing.
        let used = if account.counted {
            account.input + account.output
        } else {
            0
        };
        let closed = Closed {
            reserved: account.reserved,
            used,
            started: account.started,
            background: self.background,
        };
        self.admissions
            .accounts()
            .close(self.tenant, closed, self.admissions.uptime_ms());
        let mut open = lock(&self.admissions.open);
        open.flags.remove(&self.id);
        open.choices -= self.choices;
        drop(open);
        self.admissions.ended.notify_all();
    }
}
