//! Which sequence goes first, among the waiting and among the running ones.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::str::FromStr;

use super::sequence::NewSequence;
use crate::error::Error;

/// Cost of a generated token in a tenant's account, in prompt tokens (Sheng et al. 2024, "Fairness in Serving LLMs").
const OUTPUT_WEIGHT: u64 = 2;

/// Unit of `Account::served`, so large that division by weights loses nothing that matters.
const TOKEN: u128 = 1 << 32;

/// An order of sequences. A sequence has a level and waits in a line of that level. A line is first come, first served.
pub trait Policy: Debug + Send {
    /// Sequences of the lowest level go first, and lose their blocks last.
    fn level(&self, sequence: &NewSequence) -> i32;

    /// The line, among those of its level, in which a new sequence waits.
    fn line(&self, sequence: &NewSequence) -> u32;

    /// The line to serve next, of the non-empty lines of one level, given in ascending order.
    fn next_line(&self, lines: &mut dyn Iterator<Item = u32>) -> Option<u32>;

    /// A sequence of a tenant has arrived.
    fn arrived(&mut self, _tenant: u32) {}

    /// A sequence of a tenant has ended or was aborted.
    fn left(&mut self, _tenant: u32) {}

    /// A step computed tokens of a tenant's prompts, and sampled tokens for it.
    fn charge(&mut self, _tenant: u32, _prompt_tokens: usize, _output_tokens: usize) {}

    /// Sets a tenant's share relative to the others'. `weight` > 0.
    fn set_weight(&mut self, _tenant: u32, _weight: u32) {}
}

/// All policies, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PolicyKind {
    /// By priority, then by the tenant that was served the least for its weight, then by arrival.
    #[default]
    Fair,
    /// By arrival only.
    FirstCome,
}

impl PolicyKind {
    /// The policy, without sequences.
    pub fn policy(self) -> Box<dyn Policy> {
        match self {
            Self::Fair => Box::new(FairShares::default()),
            Self::FirstCome => Box::new(FirstCome),
        }
    }
}

impl FromStr for PolicyKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "fair" => Ok(Self::Fair),
            "fcfs" => Ok(Self::FirstCome),
            _ => {
                let message = format!("policy must be fair or fcfs, but {name:?} was given");
                Err(Error::invalid("policy", message))
            }
        }
    }
}

/// First come, first served, for all tenants together.
#[derive(Debug)]
struct FirstCome;

impl Policy for FirstCome {
    fn level(&self, _: &NewSequence) -> i32 {
        0
    }

    fn line(&self, _: &NewSequence) -> u32 {
        0
    }

    fn next_line(&self, lines: &mut dyn Iterator<Item = u32>) -> Option<u32> {
        lines.next()
    }
}

#[derive(Debug)]
struct Account {
    weight: u32,
    /// Number of sequences that wait or run.
    open: usize,
    /// Service received, relative to its weight: prompt tokens * `TOKEN` / weight.
    served: u128,
}

impl Default for Account {
    fn default() -> Self {
        Self {
            weight: 1,
            open: 0,
            served: 0,
        }
    }
}

/// One level per priority, one line per tenant. The tenant that was served the least for its weight goes first.
#[derive(Debug, Default)]
struct FairShares {
    accounts: BTreeMap<u32, Account>,
}

impl Policy for FairShares {
    fn level(&self, sequence: &NewSequence) -> i32 {
        sequence.priority
    }

    fn line(&self, sequence: &NewSequence) -> u32 {
        sequence.tenant
    }

    fn next_line(&self, lines: &mut dyn Iterator<Item = u32>) -> Option<u32> {
        let served = |id: u32| self.accounts.get(&id).map_or(0, |account| account.served);
        lines.min_by_key(|&id| (served(id), id))
    }

    fn arrived(&mut self, tenant: u32) {
        let open = self.accounts.values().filter(|account| account.open > 0);
        let floor = open.map(|account| account.served).min().unwrap_or(0);
        let account = self.accounts.entry(tenant).or_default();
        if account.open == 0 {
            // A tenant that comes back has saved up nothing: it starts level with the least served active one.
            account.served = account.served.max(floor);
        }
        account.open += 1;
    }

    fn left(&mut self, tenant: u32) {
        if let Some(account) = self.accounts.get_mut(&tenant) {
            account.open -= 1;
        }
    }

    fn charge(&mut self, tenant: u32, prompt_tokens: usize, output_tokens: usize) {
        if let Some(account) = self.accounts.get_mut(&tenant) {
            let tokens = prompt_tokens as u64 + OUTPUT_WEIGHT * output_tokens as u64;
            account.served += u128::from(tokens) * TOKEN / u128::from(account.weight);
        }
    }

    fn set_weight(&mut self, tenant: u32, weight: u32) {
        self.accounts.entry(tenant).or_default().weight = weight;
    }
}
