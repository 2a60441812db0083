//! What each tenant has used and may still use.

use std::collections::BTreeMap;

use super::bucket::TokenBucket;
use super::limits::{Tenant, TenantLimits};
use crate::error::{Error, Kind, Result};

/// Seconds after which a request beyond `max_in_flight` may try again: when another one ends is not known.
const RETRY_IN_FLIGHT: u64 = 1;

#[derive(Debug)]
struct Account {
    limits: TenantLimits,
    bucket: Option<TokenBucket>,
    in_flight: usize,
    /// Of these, the ones that the server has asked for on the tenant's behalf.
    background: usize,
    running: usize,
    requests: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    completion_tokens: u64,
}

/// What a tenant may still do now. Absent: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Most requests in flight, and how many more there may be.
    pub requests: Option<(usize, usize)>,
    /// Most tokens a minute, and how many are left.
    pub tokens: Option<(u64, u64)>,
    /// Milliseconds until all tokens of a minute are there again.
    pub reset_tokens_ms: u64,
}

/// What a tenant has used since the start, and what it does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TenantUsage {
    /// Requests that have ended, whatever their end, once they had begun.
    pub requests: u64,
    /// Of these, tokens that went to the model: histories and inputs.
    pub prompt_tokens: u64,
    /// Of these, tokens that had not to be computed.
    pub cached_tokens: u64,
    /// Generated tokens.
    pub completion_tokens: u64,
    /// Requests that have not ended.
    pub in_flight: usize,
    /// Of these, requests of which nothing has been computed yet.
    pub waiting: usize,
    /// What it may do.
    pub limits: TenantLimits,
    /// What of that is left.
    pub quota: Quota,
}

/// What a request was, when it ends.
#[derive(Debug, Clone, Copy)]
pub struct Closed {
    /// Tokens that [`Accounts::reserve`] took off the tenant's minute.
    pub reserved: usize,
    /// Tokens that it used.
    pub used: usize,
    /// [`Accounts::start`] was called.
    pub started: bool,
    /// As it was opened.
    pub background: bool,
}

/// The tenants' accounts.
#[derive(Debug, Default)]
pub struct Accounts {
    accounts: BTreeMap<u32, Account>,
}

impl Account {
    fn new(limits: TenantLimits, now_ms: u64) -> Self {
        let bucket = limits.tokens_per_minute;
        Self {
            limits,
            bucket: bucket.map(|tokens| TokenBucket::new(tokens, now_ms)),
            in_flight: 0,
            background: 0,
            running: 0,
            requests: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: 0,
        }
    }

    /// Requests in flight that the tenant's client has asked for itself.
    const fn own(&self) -> usize {
        self.in_flight - self.background
    }

    fn quota(&mut self, now_ms: u64) -> Quota {
        let left = |most: usize| (most, most.saturating_sub(self.own()));
        let requests = self.limits.max_in_flight.map(left);
        let (mut tokens, mut reset_tokens_ms) = (None, 0);
        if let (Some(bucket), Some(limit)) = (&mut self.bucket, self.limits.tokens_per_minute) {
            tokens = Some((limit, bucket.remaining(now_ms)));
            reset_tokens_ms = bucket.full_in_ms(now_ms);
        }
        Quota {
            requests,
            tokens,
            reset_tokens_ms,
        }
    }

    fn refuse(&mut self, message: String, retry_after: u64, now_ms: u64) -> Error {
        let error = Error::new(Kind::Busy, "rate_limit_exceeded", message);
        let error = error.with_detail("retry_after", retry_after);
        self.quota(now_ms).describe(error)
    }
}

impl Quota {
    /// Whether there is any limit to speak of.
    pub const fn is_limited(&self) -> bool {
        self.requests.is_some() || self.tokens.is_some()
    }

    fn describe(&self, mut error: Error) -> Error {
        if let Some((limit, remaining)) = self.requests {
            error = error
                .with_detail("limit_requests", limit)
                .with_detail("remaining_requests", remaining);
        }
        if let Some((limit, remaining)) = self.tokens {
            error = error
                .with_detail("limit_tokens", limit)
                .with_detail("remaining_tokens", remaining)
                .with_detail("reset_tokens_ms", self.reset_tokens_ms);
        }
        error
    }
}

impl Accounts {
    /// Accounts of `tenants`; others get one without limits when they first come.
    pub fn new(tenants: &[Tenant], now_ms: u64) -> Self {
        let account = |tenant: &Tenant| (tenant.number, Account::new(tenant.limits, now_ms));
        Self {
            accounts: tenants.iter().map(account).collect(),
        }
    }

    fn account(&mut self, tenant: u32, now_ms: u64) -> &mut Account {
        self.accounts
            .entry(tenant)
            .or_insert_with(|| Account::new(TenantLimits::default(), now_ms))
    }

    /// Opens a request; [`Self::close`] must follow. `background`: the server asks on the tenant's behalf, which takes
    /// nothing of `max_in_flight`.
    ///
    /// # Errors
    /// `rate_limit_exceeded` (429) where the tenant has `max_in_flight` open already.
    pub fn open(&mut self, tenant: u32, background: bool, now_ms: u64) -> Result<()> {
        let account = self.account(tenant, now_ms);
        if !background
            && let Some(limit) = account.limits.max_in_flight
            && account.own() >= limit
        {
            let message = format!(
                "this key may have at most {limit} requests in flight; it has {}, and one more was sent",
                account.own()
            );
            return Err(account.refuse(message, RETRY_IN_FLIGHT, now_ms));
        }
        account.in_flight += 1;
        account.background += usize::from(background);
        Ok(())
    }

    /// The priority at which a request runs that asks for `priority`, where 0 asks for nothing.
    ///
    /// # Errors
    /// `invalid_value` (400) for one more urgent than the tenant may ask for.
    pub fn priority(&self, tenant: u32, priority: i32) -> Result<i32> {
        let account = self.accounts.get(&tenant);
        let Some(most) = account.and_then(|account| account.limits.max_priority) else {
            return Ok(priority);
        };
        if priority == 0 || priority >= most {
            return Ok(priority.max(most));
        }
        let message = format!(
            "this key may ask for priority {most} or more (smaller is more urgent), but {priority} was given"
        );
        Err(Error::invalid("priority", message))
    }

    /// Takes the tokens of an open request from the tenant's tokens per minute: the most that it may use, as far as that is known.
    ///
    /// # Errors
    /// `rate_limit_exceeded` (429) with the time after which they are there; `exceeds_tokens_per_minute` (400) for more than
    /// a minute ever holds.
    pub fn reserve(&mut self, tenant: u32, tokens: usize, now_ms: u64) -> Result<()> {
        let account = self.account(tenant, now_ms);
        let Some(bucket) = &mut account.bucket else {
            return Ok(());
        };
        let Err(wait) = bucket.take(tokens, now_ms) else {
            return Ok(());
        };
        let (limit, left) = (account.limits.tokens_per_minute, bucket.remaining(now_ms));
        let limit = limit.unwrap_or_default();
        if let Some(wait) = wait {
            let message = format!(
                "this key may use {limit} tokens a minute and has {left} left, but this request may take {tokens}"
            );
            return Err(account.refuse(message, wait.div_ceil(1000), now_ms));
        }
        let message = format!(
            "this key may use {limit} tokens a minute, but input and output of this request may take {tokens}"
        );
        let error = Error::new(Kind::Invalid, "exceeds_tokens_per_minute", message);
        Err(error
            .with_detail("limit_tokens", limit)
            .with_detail("requested_tokens", tokens))
    }

    /// Something of an open request is being computed.
    pub fn start(&mut self, tenant: u32) {
        if let Some(account) = self.accounts.get_mut(&tenant) {
            account.running += 1;
        }
    }

    /// Counts a request that ends.
    pub fn count_request(&mut self, tenant: u32, prompt_tokens: usize, cached_tokens: usize) {
        if let Some(account) = self.accounts.get_mut(&tenant) {
            account.requests += 1;
            account.prompt_tokens += prompt_tokens as u64;
            account.cached_tokens += cached_tokens as u64;
        }
    }

    /// Counts what a request that ends has generated.
    pub fn count_output(&mut self, tenant: u32, completion_tokens: usize) {
        if let Some(account) = self.accounts.get_mut(&tenant) {
            account.completion_tokens += completion_tokens as u64;
        }
    }

    /// Closes a request.
    pub fn close(&mut self, tenant: u32, closed: Closed, now_ms: u64) {
        let Some(account) = self.accounts.get_mut(&tenant) else {
            return;
        };
        account.in_flight -= 1;
        account.background -= usize::from(closed.background);
        account.running -= usize::from(closed.started);
        if let Some(bucket) = &mut account.bucket {
            bucket.settle(closed.reserved, closed.used, now_ms);
        }
    }

    /// What the tenant may still do now.
    pub fn quota(&mut self, tenant: u32, now_ms: u64) -> Quota {
        self.account(tenant, now_ms).quota(now_ms)
    }

    /// The tenant's account.
    pub fn usage(&mut self, tenant: u32, now_ms: u64) -> TenantUsage {
        let account = self.account(tenant, now_ms);
        let quota = account.quota(now_ms);
        TenantUsage {
            requests: account.requests,
            prompt_tokens: account.prompt_tokens,
            cached_tokens: account.cached_tokens,
            completion_tokens: account.completion_tokens,
            in_flight: account.in_flight,
            waiting: account.in_flight - account.running,
            limits: account.limits,
            quota,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(reserved: usize, used: usize, started: bool) -> Closed {
        Closed {
            reserved,
            used,
            started,
            background: false,
        }
    }

    fn accounts(limits: TenantLimits) -> Accounts {
        let tenant = Tenant { number: 1, limits };
        Accounts::new(&[tenant], 0)
    }

    #[test]
    fn requests_in_flight_are_bounded_for_each_tenant_alone() {
        let mut accounts = accounts(TenantLimits {
            max_in_flight: Some(2),
            ..TenantLimits::default()
        });
        accounts.open(1, false, 0).unwrap();
        accounts.open(1, false, 0).unwrap();
        let error = accounts.open(1, false, 0).unwrap_err();
        assert_eq!(
            (error.kind, error.code),
            (Kind::Busy, "rate_limit_exceeded")
        );
        assert_eq!(error.details["limit_requests"], 2);
        assert_eq!(error.details["remaining_requests"], 0);
        assert_eq!(error.details["retry_after"], 1);
        for _ in 0..10 {
            accounts.open(2, false, 0).unwrap();
        }
        accounts.close(1, closed(0, 0, false), 0);
        accounts.open(1, false, 0).unwrap();
        assert_eq!(accounts.usage(2, 0).in_flight, 10);
    }

    #[test]
    fn what_runs_in_the_background_takes_nothing_of_what_may_be_in_flight() {
        let mut accounts = accounts(TenantLimits {
            max_in_flight: Some(1),
            ..TenantLimits::default()
        });
        for _ in 0..3 {
            accounts.open(1, true, 0).unwrap();
        }
        assert_eq!(accounts.quota(1, 0).requests, Some((1, 1)));
        accounts.open(1, false, 0).unwrap();
        assert!(accounts.open(1, false, 0).is_err());
        assert_eq!(accounts.usage(1, 0).in_flight, 4);
        for _ in 0..3 {
            let background = true;
            accounts.close(
                1,
                Closed {
                    background,
                    ..closed(0, 0, false)
                },
                0,
            );
        }
        assert!(accounts.open(1, false, 0).is_err());
        accounts.close(1, closed(0, 0, false), 0);
        assert_eq!(accounts.usage(1, 0).in_flight, 0);
        accounts.open(1, false, 0).unwrap();
    }

    #[test]
    fn retry_after_is_the_time_after_which_it_passes() {
        let mut accounts = accounts(TenantLimits {
            tokens_per_minute: Some(600),
            ..TenantLimits::default()
        });
        accounts.open(1, false, 0).unwrap();
        accounts.reserve(1, 590, 0).unwrap();
        let error = accounts.reserve(1, 100, 0).unwrap_err();
        // 90 tokens are missing, and a second brings 10.
        assert_eq!(error.details["retry_after"], 9);
        assert_eq!(error.details["remaining_tokens"], 10);
        assert_eq!(error.details["reset_tokens_ms"], 59_000);
        assert!(accounts.reserve(1, 100, 8999).is_err());
        accounts.reserve(1, 100, 9000).unwrap();
        let error = accounts.reserve(1, 601, 9000).unwrap_err();
        assert_eq!(
            (error.kind, error.code),
            (Kind::Invalid, "exceeds_tokens_per_minute")
        );
    }

    #[test]
    fn what_a_request_did_not_use_is_given_back() {
        let mut accounts = accounts(TenantLimits {
            tokens_per_minute: Some(600),
            ..TenantLimits::default()
        });
        accounts.open(1, false, 0).unwrap();
        accounts.reserve(1, 500, 0).unwrap();
        accounts.start(1);
        assert_eq!(accounts.usage(1, 0).waiting, 0);
        accounts.count_request(1, 30, 10);
        accounts.count_output(1, 20);
        accounts.close(1, closed(500, 50, true), 0);
        let usage = accounts.usage(1, 0);
        assert_eq!(usage.quota.tokens, Some((600, 550)));
        assert_eq!((usage.requests, usage.in_flight), (1, 0));
        assert_eq!((usage.prompt_tokens, usage.cached_tokens), (30, 10));
        assert_eq!(usage.completion_tokens, 20);
        assert!(usage.quota.is_limited());
        assert!(!accounts.quota(9, 0).is_limited());
    }

    #[test]
    fn a_priority_is_bounded_and_its_absence_is_not_refused() {
        for (most, asked, runs_at) in [
            (None, -7, Some(-7)),
            (Some(5), 0, Some(5)),
            (Some(5), 4, None),
            (Some(5), 5, Some(5)),
            (Some(-2), 0, Some(0)),
            (Some(-2), -2, Some(-2)),
            (Some(-2), -3, None),
        ] {
            let accounts = accounts(TenantLimits {
                max_priority: most,
                ..TenantLimits::default()
            });
            assert_eq!(
                accounts.priority(1, asked).ok(),
                runs_at,
                "{most:?} {asked}"
            );
        }
    }
}
