//! What a simulation did.

use std::ops::AddAssign;

/// A struct of counts that can be named one by one and added.
macro_rules! counts {
    ($(#[$about:meta])* $name:ident { $($(#[$what:meta])* $field:ident,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub struct $name {
            $($(#[$what])* pub $field: u64,)*
        }

        impl $name {
            /// Names and values, in the order in which they are printed.
            pub fn entries(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field),)*]
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                $(self.$field += other.$field;)*
            }
        }
    };
}

counts! {
    /// How often what happened.
    Counters {
        /// Steps that computed something.
        steps,
        submitted,
        /// Requests that reached the scheduler.
        admitted,
        /// Requests that were refused as they had to be.
        refused,
        garbage,
        tokens,
        /// Of these, those that a grammar had a say in.
        guided_tokens,
        cached_tokens,
        preemptions,
        recomputed_tokens,
        drafted_tokens,
        accepted_tokens,
        /// Of these, those that the model had guessed itself.
        mtp_accepted_tokens,
        evictions,
        window_evictions,
        /// States that were kept for whoever goes on there.
        snapshots,
        snapshot_hits,
        snapshot_evictions,
        /// Contents that were copied to the tiers below the model's memory.
        tier_saves,
        /// Contents that came back from there.
        tier_loads,
        disconnects,
        /// Streams that ended because their reader was too far behind.
        too_slow,
        /// Steps that were tried again in halves after they had failed.
        halved,
        /// Forks, rewinds, imports and ends of sessions.
        verbs,
        /// Sessions that were exported and imported again.
        imports,
        /// Responses that a conversation has written down.
        responses,
        /// Responses for which a conversation was computed anew, for its session was gone.
        begun_anew,
        /// Answers that a lane has kept.
        lane_turns,
        /// Of these, those to clients that sent only what was new.
        lane_responses,
        /// Requests that went on from a lane's tokens.
        lane_hits,
        /// Of these, those that parted from a branch.
        lane_forks,
        /// Requests of which a lane had dropped what was said.
        lane_misses,
        /// Answers to lines of batches that were written down.
        lines,
        /// Lines that were asked again, for there was no answer, or it was not written down.
        lines_again,
        /// Sessions that a log brought back.
        restored,
        /// Of these, those that a damaged record left read-only.
        read_only,
        /// Sessions that a damaged record took whole.
        lost,
        /// Logs that were rewritten for they had grown.
        rewrites,
        /// Logs that were written anew after a fault.
        mended_logs,
        /// Turns that were refused because their log could not be written.
        unwritten_turns,
    }
}

counts! {
    /// How often what was made to go wrong.
    Faults {
        /// Steps that failed, whatever they held.
        failed_steps,
        /// Requests that make each step fail that holds them.
        failing_rows,
        /// Answers whose logits are not finite.
        not_finite_rows,
        /// Requests whose preparation panicked.
        prepare_panics,
        /// Masks whose computation panicked.
        mask_panics,
        /// Turns while whose writing the log panicked.
        log_panics,
        /// Times that the drive of a tier had no room.
        full_drives,
        /// Times that it did not answer for a while.
        gone_drives,
        /// Contents on it that were cut or changed.
        damaged_contents,
        /// Plans whose contents from below could not be loaded.
        failed_loads,
        /// Writes that found the disk full.
        full_disks,
        /// Syncs of a log or of its place that failed.
        failed_syncs,
        /// Servers that died.
        kills,
        /// Of these, those whose logs ended in a record that was written in part.
        torn_ends,
        /// Of these, those whose machine lost its power.
        power_losses,
        /// Bits that were flipped in a log before it was opened again.
        flipped_bits,
    }
}

/// The outcome of a simulation without a violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Servers that lived, each of sizes of its own.
    pub worlds: u64,
    /// What happened in all of them.
    pub counters: Counters,
    /// What was made to go wrong in them.
    pub faults: Faults,
    /// Hash of every byte that clients read, in order: equal for equal seeds.
    pub digest: u64,
}
