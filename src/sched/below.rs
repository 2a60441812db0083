//! Sequences whose prefix lies below the model's memory: they wait until it is read, beside the queue, so that nobody waits for them.
//! And what goes down: contents that are given up, and those of sequences that have ended.

use std::collections::VecDeque;

use super::lower::{Fetching, Lower, Wanted};
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use super::transfers::{Load, Save, Staged, Transfers};
use crate::kv::Place;
use crate::tier::{Below, Payload};

/// Bytes that are read ahead for sequences that are not in the batch yet.
const MAX_STAGED: usize = 256 << 20;
impl Scheduler {
    /// The same over tiers below the model's memory, in a pool whose contents have names. At most `saves_at_once` contents of
    /// sequences that have ended are copied with a step.
    #[must_use]
    pub fn with_below(mut self, tiers: Box<dyn Below>, saves_at_once: usize) -> Self {
        self.lower = Some(Box::new(Lower {
            tiers,
            fetching: VecDeque::new(),
            in_flight: None,
            unsaved: VecDeque::new(),
            saves_at_once: saves_at_once.max(1),
            transfers: Transfers::default(),
        }));
        self
    }

    /// What the plan made last wants copied before its step.
    pub fn take_transfers(&mut self) -> Transfers {
        let lower = self.lower.as_mut();
        lower.map_or_else(Transfers::default, |lower| {
            std::mem::take(&mut lower.transfers)
        })
    }

    /// Hands a content that was copied out of the model's memory to the tiers.
    pub fn save(&mut self, save: Save, payload: Payload) {
        if let Some(lower) = &mut self.lower {
            lower.tiers.save(save.key, payload, save.evicted);
        }
    }

    /// Sequences whose prefixes are being read, or wait for that.
    pub fn fetching(&self) -> usize {
        self.lower.as_ref().map_or(0, |lower| lower.fetching.len())
    }

    /// Whether contents wait to be copied that could be.
    pub fn has_unsaved(&self) -> bool {
        let lower = self.lower.as_ref();
        lower.is_some_and(|lower| !lower.unsaved.is_empty() && !lower.tiers.is_busy())
    }

    /// Queues a sequence, or lets it wait beside the queue for what the tiers have of its prefix.
    pub(super) fn enqueue(&mut self, sequence: Box<Sequence>, line: u32) {
        if let Some(lower) = &mut self.lower
            && let Some(wanted) = sequence.wanted(&self.pool, &*lower.tiers)
        {
            lower.fetching.push_back(Fetching {
                sequence,
                line,
                wanted,
            });
        } else {
            self.queue.push(sequence, line);
        }
    }

    /// Queues the sequences whose prefixes have been read, and has the next one's read.
    pub(super) fn take_fetched(&mut self) {
        let Some(lower) = &mut self.lower else {
            return;
        };
        for (ticket, mut payloads) in lower.tiers.fetched() {
            lower.in_flight = lower.in_flight.filter(|&id| id != ticket);
            let found = lower
                .fetching
                .iter()
                .position(|f| f.sequence.id() == ticket);
            let Some(mut fetched) = found.and_then(|at| lower.fetching.remove(at)) else {
                // It was aborted meanwhile.
                continue;
            };
            let Wanted { first, keys, tail } = fetched.wanted;
            let whole = payloads.len() == keys.len();
            if tail.is_some() && !whole {
                // What could not be read is gone. Perhaps there is an earlier state.
                if let Some(wanted) = fetched.sequence.wanted(&self.pool, &*lower.tiers) {
                    fetched.wanted = wanted;
                    lower.fetching.push_front(fetched);
                    continue;
                }
                // Blocks alone are nothing to go on from.
            } else {
                let state = tail.and_then(|tail| Some((tail, payloads.pop()?)));
                fetched.sequence.staged = Some(Box::new(Staged {
                    first,
                    blocks: payloads,
                    state,
                }));
            }
            self.queue.push(fetched.sequence, fetched.line);
        }
        let (None, Some(next)) = (lower.in_flight, lower.fetching.front()) else {
            return;
        };
        let staged = self
            .queue
            .iter()
            .filter_map(|sequence| sequence.staged.as_ref());
        if staged.map(|staged| staged.bytes()).sum::<usize>() < MAX_STAGED {
            let id = next.sequence.id();
            lower.tiers.fetch(id, next.wanted.keys.clone());
            lower.in_flight = Some(id);
        }
    }

    /// Lets a sequence that joins the batch begin with what was read for it.
    pub(super) fn restore(&mut self, sequence: &mut Sequence) {
        if let (Some(staged), Some(lower)) = (sequence.staged.take(), &mut self.lower) {
            let loads = sequence.restore(&self.pool, &staged);
            lower.transfers.loads.extend(loads);
        }
    }

    /// Says what is to be copied before the step that has been planned.
    pub fn plan_transfers(&mut self) {
        let Some(lower) = &mut self.lower else {
            return;
        };
        for (key, place) in self.pool.take_evicted() {
            if lower.tiers.wants_evicted(&key) {
                let evicted = true;
                lower.transfers.saves.push(Save {
                    key,
                    place,
                    evicted,
                });
            }
        }
        if lower.tiers.is_busy() {
            return;
        }
        let mut left = lower.saves_at_once;
        while left > 0
            && let Some((key, place)) = lower.unsaved.pop_front()
        {
            if self.pool.lies_at(&key, place) && lower.tiers.wants(&key) {
                let evicted = false;
                lower.transfers.saves.push(Save {
                    key,
                    place,
                    evicted,
                });
                left -= 1;
            }
        }
    }

    /// Books that these loads, and with them the step planned last, did not come to pass. Whoever holds what they were to bring
    /// waits again, and computes it.
    pub fn fail_loads(&mut self, loads: &[Load]) {
        let (mut blocks, mut slots) = (Vec::new(), Vec::new());
        for load in loads {
            match load.place {
                Place::Block(block) => blocks.push(block),
                Place::State { slot, tail_block } => {
                    slots.push(slot);
                    blocks.extend(tail_block);
                }
            }
            self.pool.forget_place(load.place);
        }
        self.step.clear();
        self.grants.clear();
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            // Drafts are not tried again, and what holds no token holds no block.
            sequence.table.truncate(sequence.tokens.len());
            let table = &sequence.table;
            let mut held = table.blocks().iter().copied().chain(table.copied_block());
            if held.any(|block| blocks.contains(&block))
                || table.held_slots().any(|slot| slots.contains(&slot))
            {
                let mut sequence = self.running.remove(at);
                sequence.preemptions += 1;
                sequence.detach(&self.pool);
                self.queue.push_preempted(sequence);
            } else {
                at += 1;
            }
        }
    }
}
