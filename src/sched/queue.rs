//! Sequences that wait for a place in the batch: by priority, then the tenant that was served least for its weight, then
//! arrival.

use std::collections::{BTreeMap, VecDeque};

use super::sequence::Sequence;

/// What a generated token costs in a tenant's account, in prompt tokens (Sheng et al. 2024, "Fairness in Serving LLMs").
const OUTPUT_WEIGHT: u64 = 2;

/// Unit of `Tenant::served`: divides by weights without a loss worth a name.
const TOKEN: u128 = 1 << 32;

#[derive(Debug)]
struct Tenant {
    weight: u32,
    waiting: usize,
    running: usize,
    /// Service received for its weight: prompt tokens * `TOKEN` / weight.
    served: u128,
}

impl Default for Tenant {
    fn default() -> Self {
        Self {
            weight: 1,
            waiting: 0,
            running: 0,
            served: 0,
        }
    }
}

/// The waiting sequences.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Sequences that had run and lost their blocks; by priority and arrival, before all others of their priority.
    preempted: VecDeque<Box<Sequence>>,
    levels: BTreeMap<i32, BTreeMap<u32, VecDeque<Box<Sequence>>>>,
    tenants: BTreeMap<u32, Tenant>,
    len: usize,
}

impl Queue {
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Sets a tenant's share relative to the others'. `weight` > 0.
    pub(super) fn set_weight(&mut self, tenant: u32, weight: u32) {
        self.tenants.entry(tenant).or_default().weight = weight;
    }

    pub(super) fn push(&mut self, sequence: Box<Sequence>) {
        let id = sequence.new.tenant;
        let idle = self
            .tenants
            .get(&id)
            .is_none_or(|t| t.waiting + t.running == 0);
        if idle {
            // A tenant that comes back has saved nothing up: it starts level with the least served active one.
            let floor = self.active().map(|t| t.served).min().unwrap_or(0);
            let tenant = self.tenants.entry(id).or_default();
            tenant.served = tenant.served.max(floor);
        }
        self.tenants.entry(id).or_default().waiting += 1;
        self.levels
            .entry(sequence.new.priority)
            .or_default()
            .entry(id)
            .or_default()
            .push_back(sequence);
        self.len += 1;
    }

    fn active(&self) -> impl Iterator<Item = &Tenant> {
        self.tenants
            .values()
            .filter(|tenant| tenant.waiting + tenant.running > 0)
    }

    /// Puts back a sequence that lost its blocks; it keeps its place among its like.
    pub(super) fn push_preempted(&mut self, sequence: Box<Sequence>) {
        let at = self
            .preempted
            .partition_point(|other| other.rank() < sequence.rank());
        self.tenant_stopped(sequence.new.tenant);
        if let Some(tenant) = self.tenants.get_mut(&sequence.new.tenant) {
            tenant.waiting += 1;
        }
        self.preempted.insert(at, sequence);
        self.len += 1;
    }

    fn next_place(&self) -> Option<(i32, u32)> {
        let (&priority, level) = self.levels.iter().next()?;
        let served = |id: u32| self.tenants.get(&id).map_or(0, |tenant| tenant.served);
        let id = level.keys().copied().min_by_key(|&id| (served(id), id))?;
        Some((priority, id))
    }

    fn preempted_is_next(&self) -> bool {
        let best = self.levels.keys().next();
        self.preempted
            .front()
            .is_some_and(|sequence| best.is_none_or(|&priority| sequence.new.priority <= priority))
    }

    /// The sequence that is next.
    pub(super) fn peek_mut(&mut self) -> Option<&mut Sequence> {
        if self.preempted_is_next() {
            return self.preempted.front_mut().map(|sequence| &mut **sequence);
        }
        let (priority, id) = self.next_place()?;
        self.levels
            .get_mut(&priority)?
            .get_mut(&id)?
            .front_mut()
            .map(|sequence| &mut **sequence)
    }

    /// Takes the sequence that is next; its tenant now runs one more.
    pub(super) fn pop(&mut self) -> Option<Box<Sequence>> {
        let sequence = if self.preempted_is_next() {
            self.preempted.pop_front()?
        } else {
            let (priority, id) = self.next_place()?;
            self.take_at(priority, id, 0)?
        };
        self.len -= 1;
        if let Some(tenant) = self.tenants.get_mut(&sequence.new.tenant) {
            tenant.waiting -= 1;
            tenant.running += 1;
        }
        Some(sequence)
    }

    fn take_at(&mut self, priority: i32, id: u32, index: usize) -> Option<Box<Sequence>> {
        let level = self.levels.get_mut(&priority)?;
        let queue = level.get_mut(&id)?;
        let sequence = queue.remove(index);
        if queue.is_empty() {
            level.remove(&id);
        }
        if level.is_empty() {
            self.levels.remove(&priority);
        }
        sequence
    }

    /// Takes the sequence of that id out, wherever it waits.
    pub(super) fn remove(&mut self, id: u64) -> Option<Box<Sequence>> {
        let sequence = if let Some(at) = self
            .preempted
            .iter()
            .position(|sequence| sequence.id() == id)
        {
            self.preempted.remove(at)
        } else {
            let place = self.levels.iter().find_map(|(&priority, level)| {
                level.iter().find_map(|(&tenant, queue)| {
                    queue
                        .iter()
                        .position(|sequence| sequence.id() == id)
                        .map(|at| (priority, tenant, at))
                })
            });
            place.and_then(|(priority, tenant, at)| self.take_at(priority, tenant, at))
        };
        if let Some(sequence) = &sequence {
            self.len -= 1;
            if let Some(tenant) = self.tenants.get_mut(&sequence.new.tenant) {
                tenant.waiting -= 1;
            }
        }
        sequence
    }

    /// Notes that a tenant's sequence left the batch.
    pub(super) fn tenant_stopped(&mut self, tenant: u32) {
        if let Some(tenant) = self.tenants.get_mut(&tenant) {
            tenant.running -= 1;
        }
    }

    /// Puts computed prompt tokens and generated tokens on a tenant's account.
    pub(super) fn charge(&mut self, tenant: u32, prompt_tokens: usize, output_tokens: usize) {
        if let Some(tenant) = self.tenants.get_mut(&tenant) {
            let tokens = prompt_tokens as u64 + OUTPUT_WEIGHT * output_tokens as u64;
            tenant.served += u128::from(tokens) * TOKEN / u128::from(tenant.weight);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        let waiting = self.levels.values().flat_map(BTreeMap::values).flatten();
        self.preempted
            .iter()
            .chain(waiting)
            .map(|sequence| &**sequence)
    }
}
