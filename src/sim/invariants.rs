//! What must hold after every step, and when nothing runs.

use std::sync::PoisonError;

use super::check::{Check, ensure};
use super::records::check_store;
use super::world::World;
use crate::kv::StatePool;

impl World {
    /// Compares blocks, slots and open answers with what the running and waiting sequences hold.
    pub(super) fn check(&self) -> Check {
        let (scheduler, sizes) = (self.core.scheduler(), self.config.scheduler);
        let (pool, stats) = (scheduler.pool(), scheduler.stats());
        let (counts, references) = (pool.counts(), pool.references());
        let owned = references.iter().filter(|&&count| count > 0).count();
        let total = counts.free + owned + counts.cached;
        ensure(total == pool.num_blocks(), || {
            format!("{counts:?}, {owned} are owned")
        })?;
        let mut held = vec![0; references.len()];
        for sequence in scheduler.running().chain(scheduler.waiting()) {
            let table = sequence.table();
            for block in table.blocks().iter().copied().chain(table.copied_block()) {
                held[block as usize] += 1;
            }
        }
        let surplus = scheduler.running().find(|sequence| {
            let needed = sequence.tokens().len().div_ceil(pool.block_size());
            sequence.table().blocks().len() > needed
        });
        ensure(surplus.is_none(), || {
            format!("holds blocks for more than its tokens: {surplus:?}")
        })?;
        ensure(held == references, || {
            format!("held {held:?}, counted {references:?}")
        })?;
        self.check_states()?;
        self.check_windows()?;
        self.check_lanes()?;
        let most = sizes.max_queue + sizes.max_batch;
        let bounded = stats.running <= sizes.max_batch && stats.waiting <= most;
        ensure(bounded, || format!("out of bounds: {stats:?}"))?;
        let known = (stats.running + stats.waiting, self.core.open_choices());
        let expected = self.ledger.admitted_answers();
        ensure(known == (expected, expected), || {
            format!("{known:?} answers are open, not {expected}")
        })
    }

    /// Each slot is free, a snapshot, or one sequence's, and is counted for each that holds it.
    fn check_states(&self) -> Check {
        let scheduler = self.core.scheduler();
        let Some(states) = scheduler.pool().states() else {
            return Ok(());
        };
        let (counts, references) = (states.counts(), states.references());
        let mut held = vec![0; references.len()];
        for sequence in scheduler.running().chain(scheduler.waiting()) {
            for slot in sequence.table().held_slots() {
                held[slot as usize] += 1;
            }
        }
        ensure(held == references, || {
            format!("held slots {held:?}, counted {references:?}")
        })?;
        let total = counts.free + counts.owned + counts.snapshots;
        let used = references.iter().filter(|&&count| count > 0).count();
        ensure(total == states.num_slots() && counts.owned <= used, || {
            format!("{counts:?}, {used} slots are held")
        })
    }

    /// Each window block is free, cached, or counted for each sequence that holds it; and between two steps a sequence holds those
    /// alone that its window and what it computes next need.
    fn check_windows(&self) -> Check {
        let scheduler = self.core.scheduler();
        let (pool, Some((window, _))) = (scheduler.pool(), self.config.windows) else {
            return Ok(());
        };
        let (counts, references) = (pool.window_counts(), pool.window_references());
        let mut held = vec![0; references.len()];
        for sequence in scheduler.running().chain(scheduler.waiting()) {
            let table = sequence.table();
            let own = table.window().ok_or("a sequence without window blocks")?;
            ensure(own.first + own.blocks.len() == table.blocks().len(), || {
                format!("window blocks {own:?} of {:?}", table.blocks())
            })?;
            for &block in own.blocks.iter() {
                held[block as usize] += 1;
            }
            let size = pool.block_size();
            let ahead = table.blocks().len() - sequence.computed() / size;
            let most = window.div_ceil(size) + ahead;
            ensure(own.blocks.len() <= most, || {
                format!("{} window blocks, not {most}", own.blocks.len())
            })?;
        }
        ensure(held == references, || {
            format!("held window blocks {held:?}, counted {references:?}")
        })?;
        let owned = references.iter().filter(|&&count| count > 0).count();
        let total = counts.free + counts.cached + owned;
        ensure(total == references.len() && counts.owned == owned, || {
            format!("{counts:?}, {owned} window blocks are held")
        })
    }

    /// What must hold when nothing runs.
    pub(super) fn check_rest(&self) -> Check {
        let pool = self.core.scheduler().pool();
        let counts = pool.counts();
        ensure(counts.owned == 0, || format!("idle, but {counts:?}"))?;
        let windows = pool.window_counts();
        ensure(windows.owned == 0, || format!("idle, but {windows:?}"))?;
        let states = pool.states().map(StatePool::counts).unwrap_or_default();
        ensure(states.owned == 0, || format!("idle, but {states:?}"))?;
        let busy = self
            .ledger
            .sessions
            .iter()
            .find(|(_, s)| s.running.is_some());
        ensure(busy.is_none(), || format!("{busy:?} is busy for ever"))?;
        self.check_idle_lanes()?;
        self.check_sessions()
    }

    /// Each session is at its last committed turn, whatever runs.
    pub(super) fn check_sessions(&self) -> Check {
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        check_store(&store, &self.ledger.sessions)
    }
}
