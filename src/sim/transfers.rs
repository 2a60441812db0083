//! What is copied between the model's memory and the tiers below, and what happens to their drive.

use super::check::{Check, ensure};
use super::world::World;
use crate::engine::Executor;
use crate::kv::Place;
use crate::sched::{Load, Transfers};
use crate::tier::Payload;

impl World {
    /// The drive fills up, is gone for a while, or lies; `unruly`: otherwise it is well.
    pub(super) fn disturb_tiers(&mut self, unruly: bool) {
        let random = &mut self.random;
        let mut drive = self.drive.drive();
        if !unruly {
            (drive.room, drive.gone) = (usize::MAX, false);
            return;
        }
        if random.once_in(100) {
            drive.room = [0, 2000, usize::MAX][random.range(0, 2)];
            self.faults.full_drives += u64::from(drive.room < usize::MAX);
        }
        if random.once_in(100) {
            drive.gone = random.once_in(2);
            self.faults.gone_drives += u64::from(drive.gone);
        }
        if random.once_in(20) && !drive.files.is_empty() {
            let at = random.range(0, drive.files.len() - 1);
            let Some((file, _)) = drive.files.values_mut().nth(at) else {
                return;
            };
            if random.once_in(3) {
                file.truncate(random.range(0, file.len()));
            } else if !file.is_empty() {
                let bit = random.range(0, file.len() * 8 - 1);
                file[bit / 8] ^= 1 << (bit % 8);
            }
            self.faults.damaged_contents += 1;
        }
    }

    /// Copies what the plan wants copied. What comes from below must be what its sequence's tokens say.
    pub(super) fn transfer(&mut self, unruly: bool) -> Check {
        let Transfers { saves, loads } = self.core.scheduler_mut().take_transfers();
        for save in saves {
            self.counters.tier_saves += 1;
            let bytes = self.model.save(save.place);
            let bytes = bytes.map_err(|error| error.message)?;
            self.core.scheduler_mut().save(save, Payload::new(bytes));
        }
        self.counters.tier_loads += loads.len() as u64;
        for load in &loads {
            self.check_load(load)?;
        }
        if unruly && !loads.is_empty() && self.random.once_in(10) {
            self.faults.failed_loads += 1;
            self.core.scheduler_mut().fail_loads(&loads);
            return Ok(());
        }
        for load in &loads {
            let loaded = self.model.load(load.place, &load.payload);
            loaded.map_err(|error| error.message)?;
        }
        self.check_tiers()
    }

    fn check_load(&self, load: &Load) -> Check {
        let Place::Block(block) = load.place else {
            return Ok(());
        };
        let size = self.config.block_size;
        let (tokens, _) = load.payload.as_chunks();
        let tokens: Vec<u32> = tokens
            .iter()
            .map(|&bytes| u32::from_le_bytes(bytes))
            .collect();
        for sequence in self.core.scheduler().running() {
            let blocks = sequence.table().blocks();
            if let Some(at) = blocks.iter().position(|&other| other == block) {
                let own = sequence.tokens().get(at * size..(at + 1) * size);
                ensure(own == Some(&tokens), || {
                    format!("{tokens:?} came from below for {own:?}")
                })?;
            }
        }
        Ok(())
    }

    /// No tier holds more than it may, and nothing that can be computed waits for a drive.
    fn check_tiers(&self) -> Check {
        let (Some(store), Some(limits)) = (&self.tiers, self.config.tiers) else {
            return Ok(());
        };
        let stats = store.stats();
        let host = limits.host_blocks + limits.host_states;
        ensure(
            stats.host.bytes <= host && stats.disk.bytes <= limits.disk,
            || format!("{stats:?}, but {limits:?}"),
        )
    }
}
