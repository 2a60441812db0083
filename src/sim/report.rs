//! What a simulation did.

use std::ops::AddAssign;

/// How often what happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Counters {
    /// Steps that computed something.
    pub steps: u64,
    pub submitted: u64,
    /// Requests that reached the scheduler.
    pub admitted: u64,
    /// Requests that were refused as they had to be.
    pub refused: u64,
    pub garbage: u64,
    pub tokens: u64,
    pub cached_tokens: u64,
    pub preemptions: u64,
    pub drafted_tokens: u64,
    pub accepted_tokens: u64,
    pub evictions: u64,
    /// States that were kept for whoever goes on there.
    pub snapshots: u64,
    pub snapshot_hits: u64,
    pub snapshot_evictions: u64,
    pub disconnects: u64,
    /// Streams that ended because their reader was too far behind.
    pub too_slow: u64,
    /// Steps that failed.
    pub faults: u64,
    /// Of these, those that were tried again in halves, or ended the one sequence at fault.
    pub halved: u64,
    /// Answers whose logits were not finite.
    pub not_finite: u64,
    /// Requests whose preparation panicked.
    pub panics: u64,
    pub kills: u64,
    /// Sessions that a log brought back.
    pub restored: u64,
    /// Logs that were rewritten.
    pub rewrites: u64,
    /// Forks, rewinds and ends of sessions.
    pub verbs: u64,
}

impl Counters {
    /// Names and values, in the order in which they are printed.
    pub fn entries(&self) -> [(&'static str, u64); 24] {
        [
            ("steps", self.steps),
            ("submitted", self.submitted),
            ("admitted", self.admitted),
            ("refused", self.refused),
            ("garbage", self.garbage),
            ("tokens", self.tokens),
            ("cached_tokens", self.cached_tokens),
            ("preemptions", self.preemptions),
            ("drafted_tokens", self.drafted_tokens),
            ("accepted_tokens", self.accepted_tokens),
            ("evictions", self.evictions),
            ("snapshots", self.snapshots),
            ("snapshot_hits", self.snapshot_hits),
            ("snapshot_evictions", self.snapshot_evictions),
            ("disconnects", self.disconnects),
            ("too_slow", self.too_slow),
            ("faults", self.faults),
            ("halved", self.halved),
            ("not_finite", self.not_finite),
            ("panics", self.panics),
            ("kills", self.kills),
            ("restored", self.restored),
            ("rewrites", self.rewrites),
            ("verbs", self.verbs),
        ]
    }
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.submitted += other.submitted;
        self.admitted += other.admitted;
        self.refused += other.refused;
        self.garbage += other.garbage;
        self.tokens += other.tokens;
        self.cached_tokens += other.cached_tokens;
        self.preemptions += other.preemptions;
        self.drafted_tokens += other.drafted_tokens;
        self.accepted_tokens += other.accepted_tokens;
        self.evictions += other.evictions;
        self.snapshots += other.snapshots;
        self.snapshot_hits += other.snapshot_hits;
        self.snapshot_evictions += other.snapshot_evictions;
        self.disconnects += other.disconnects;
        self.too_slow += other.too_slow;
        self.faults += other.faults;
        self.halved += other.halved;
        self.not_finite += other.not_finite;
        self.panics += other.panics;
        self.kills += other.kills;
        self.restored += other.restored;
        self.rewrites += other.rewrites;
        self.verbs += other.verbs;
    }
}

/// The outcome of a simulation without a violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Servers that lived, each of sizes of its own.
    pub worlds: u64,
    /// What happened in all of them.
    pub counters: Counters,
    /// Hash of every byte that clients read, in order: equal for equal seeds.
    pub digest: u64,
}
