//! Latencies and outcomes of requests, and all metrics in Prometheus' text format.

use std::fmt::{Display, Write};
use std::time::Duration;

use super::config::Stats;
use crate::sched::FinishReason;
use crate::tier::{StoreStats, TierStats};

/// Upper bounds of the histograms' buckets, in seconds. One more bucket has no bound.
const BOUNDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0,
];

/// Durations by size.
#[derive(Debug, Default)]
struct Histogram {
    counts: [u64; BOUNDS.len() + 1],
    sum: f64,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Stop,
    Length,
    Abort,
    Error,
}

const OUTCOMES: [(Outcome, &str); 4] = [
    (Outcome::Stop, "stop"),
    (Outcome::Length, "length"),
    (Outcome::Abort, "abort"),
    (Outcome::Error, "error"),
];

/// How long requests waited and ran, and how they ended.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    queue: Histogram,
    first_token: Histogram,
    between_tokens: Histogram,
    whole: Histogram,
    outcomes: [u64; OUTCOMES.len()],
    prompt_tokens: u64,
}

impl Histogram {
    fn observe(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        let at = BOUNDS.partition_point(|&bound| bound < seconds);
        self.counts[at] += 1;
        self.sum += seconds;
    }
}

impl From<FinishReason> for Outcome {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
            FinishReason::Abort => Self::Abort,
        }
    }
}

impl Latencies {
    /// Records that a request's first step begins. `age`: the time since it arrived.
    pub(super) fn start(&mut self, age: Duration) {
        self.queue.observe(age);
    }

    /// Records a request's first token. `age`: the time since it arrived.
    pub(super) fn first_token(&mut self, age: Duration) {
        self.first_token.observe(age);
    }

    /// Counts the prompt tokens of a request, including cached ones.
    pub(super) const fn prompt(&mut self, tokens: usize) {
        self.prompt_tokens += tokens as u64;
    }

    /// Records a further token of a request. `time`: since the token before it.
    pub(super) fn next_token(&mut self, time: Duration) {
        self.between_tokens.observe(time);
    }

    /// Records the end of a request. `age`: the time since it arrived.
    pub(super) fn end(&mut self, age: Duration, outcome: Outcome) {
        self.whole.observe(age);
        self.outcomes[outcome as usize] += 1;
    }
}

/// Writes metrics in Prometheus' text format, version 0.0.4.
struct Writer(String);

impl Writer {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn line(&mut self, line: impl Display) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{line}");
    }

    fn value(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.head(name, kind, help);
        self.line(format_args!("{name} {value}"));
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let mut count = 0;
        for (bound, in_bucket) in BOUNDS.iter().zip(histogram.counts) {
            count += in_bucket;
            self.line(format_args!("{name}_bucket{{le=\"{bound}\"}} {count}"));
        }
        count += histogram.counts[BOUNDS.len()];
        self.line(format_args!("{name}_bucket{{le=\"+Inf\"}} {count}"));
        self.line(format_args!("{name}_sum {}", histogram.sum));
        self.line(format_args!("{name}_count {count}"));
    }
}

/// The whole page.
pub(super) fn render(stats: &Stats, latencies: &Latencies) -> String {
    let mut out = Writer(String::with_capacity(8192));
    write_gauges(&mut out, stats);
    write_counters(&mut out, stats);
    write_tiers(&mut out, &stats.tiers);
    out.value(
        "lmserve_prompt_tokens_total",
        "counter",
        "Prompt tokens of started requests, computed and cached.",
        latencies.prompt_tokens,
    );
    out.head(
        "lmserve_requests_total",
        "counter",
        "Requests that have ended, by outcome.",
    );
    for (outcome, word) in OUTCOMES {
        let count = latencies.outcomes[outcome as usize];
        out.line(format_args!(
            "lmserve_requests_total{{outcome=\"{word}\"}} {count}"
        ));
    }
    for (name, help, histogram) in [
        (
            "queue",
            "Time from a request's arrival to its first step.",
            &latencies.queue,
        ),
        (
            "time_to_first_token",
            "Time from a request's arrival to its first token.",
            &latencies.first_token,
        ),
        (
            "inter_token",
            "Time between two tokens of a request's first choice.",
            &latencies.between_tokens,
        ),
        (
            "request",
            "Time from a request's arrival to its end.",
            &latencies.whole,
        ),
    ] {
        out.histogram(&format!("lmserve_{name}_seconds"), help, histogram);
    }
    out.0
}

fn write_gauges(out: &mut Writer, stats: &Stats) {
    let scheduler = &stats.scheduler;
    let waiting = "Sequences that wait for a place in the batch.";
    let log_faulty = "1 while the session log cannot be written.";
    let log_bytes = "Size of the session log; 0 without one.";
    for (name, help, value) in [
        (
            "requests_running",
            "Sequences in the batch.",
            scheduler.running as u64,
        ),
        ("requests_waiting", waiting, scheduler.waiting as u64),
        (
            "requests_open",
            "Requests that have not ended.",
            stats.open_requests as u64,
        ),
        ("sessions", "Live sessions.", stats.sessions as u64),
        (
            "lanes",
            "Lanes: conversations of clients that send the whole history with each request.",
            stats.lanes as u64,
        ),
        ("session_log_bytes", log_bytes, stats.log_bytes),
        (
            "session_log_faulty",
            log_faulty,
            u64::from(stats.log_faulty),
        ),
        (
            "healthy",
            "1 while the engine is healthy, as in /health.",
            u64::from(stats.healthy),
        ),
        (
            "step_wait_milliseconds",
            "Time for which work has waited for a step.",
            stats.stalled_ms,
        ),
    ] {
        out.value(&format!("lmserve_{name}"), "gauge", help, value);
    }
    out.head("lmserve_kv_blocks", "gauge", "KV blocks by state.");
    for (state, value) in [
        ("free", stats.free_blocks),
        ("owned", stats.owned_blocks),
        ("cached", stats.cached_blocks),
    ] {
        out.line(format_args!(
            "lmserve_kv_blocks{{state=\"{state}\"}} {value}"
        ));
    }
    let help =
        "KV blocks of layers with a window, by state. Always 0 for a model without such layers.";
    out.head("lmserve_window_blocks", "gauge", help);
    for (state, value) in [
        ("free", stats.windows.free),
        ("owned", stats.windows.owned),
        ("cached", stats.windows.cached),
    ] {
        out.line(format_args!(
            "lmserve_window_blocks{{state=\"{state}\"}} {value}"
        ));
    }
    let help = "Slots of recurrent states, by use. Always 0 for a model without recurrent layers.";
    out.head("lmserve_state_slots", "gauge", help);
    for (state, value) in [
        ("free", stats.states.free),
        ("owned", stats.states.owned),
        ("snapshot", stats.states.snapshots),
    ] {
        out.line(format_args!(
            "lmserve_state_slots{{state=\"{state}\"}} {value}"
        ));
    }
}

/// A counter of one tier.
type Count = fn(TierStats) -> u64;

/// Metrics of the tiers below the model's memory.
fn write_tiers(out: &mut Writer, stats: &StoreStats) {
    let tiers = [("host", stats.host), ("disk", stats.disk)];
    let failures = "Reads, writes and deletions that failed, and contents that were damaged.";
    let counts: [(&str, &str, &str, Count); 8] = [
        (
            "entries",
            "gauge",
            "Blocks and states that a tier holds.",
            |tier| tier.entries,
        ),
        ("bytes", "gauge", "Bytes that they take.", |tier| tier.bytes),
        (
            "hits_total",
            "counter",
            "Blocks and states that were read from a tier.",
            |tier| tier.hits,
        ),
        (
            "read_bytes_total",
            "counter",
            "Bytes that were read from a tier.",
            |tier| tier.read_bytes,
        ),
        (
            "written_bytes_total",
            "counter",
            "Bytes that were written to a tier.",
            |tier| tier.written_bytes,
        ),
        (
            "evictions_total",
            "counter",
            "Blocks and states that a tier gave up for others.",
            |tier| tier.evictions,
        ),
        ("failures_total", "counter", failures, |tier| tier.failures),
        (
            "skipped_total",
            "counter",
            "Blocks and states that were not written, for too many waited.",
            |tier| tier.skipped,
        ),
    ];
    for (name, kind, help, count) in counts {
        let name = format!("lmserve_tier_{name}");
        out.head(&name, kind, help);
        for (tier, stats) in tiers {
            out.line(format_args!("{name}{{tier=\"{tier}\"}} {}", count(stats)));
        }
    }
}

fn write_counters(out: &mut Writer, stats: &Stats) {
    let scheduler = &stats.scheduler;
    let computed = "Tokens that the model has computed.";
    let cached = "Prompt tokens that were found in the prefix cache.";
    let drafted = "Draft tokens that were computed (--speculate, --mtp).";
    let accepted = "Draft tokens that were accepted.";
    let preempted = "Preemptions: sequences that lost their KV blocks to others.";
    let recomputed = "Tokens that were computed again after a preemption.";
    let taken = "Snapshots of recurrent states that were taken.";
    let hits = "Sequences that continued from a snapshot.";
    let log_failures = "Writes, fsyncs and rewrites of the session log that failed.";
    let log_rewrites = "Rewrites of the session log without deleted sessions and turns.";
    for (name, help, value) in [
        ("steps", "Steps of the model.", scheduler.steps),
        ("failed_steps", "Steps that failed.", stats.failed_steps),
        ("computed_tokens", computed, scheduler.computed_tokens),
        (
            "generated_tokens",
            "Tokens that were sampled.",
            scheduler.sampled_tokens,
        ),
        ("drafted_tokens", drafted, scheduler.drafted_tokens),
        ("accepted_tokens", accepted, scheduler.accepted_tokens),
        (
            "mtp_drafted_tokens",
            "Draft tokens that the model's own head guessed (--mtp).",
            scheduler.mtp_drafted_tokens,
        ),
        (
            "mtp_accepted_tokens",
            "Of these, those that were accepted.",
            scheduler.mtp_accepted_tokens,
        ),
        ("prefix_cache_hit_tokens", cached, scheduler.cached_tokens),
        ("preemptions", preempted, scheduler.preemptions),
        ("recomputed_tokens", recomputed, scheduler.recomputed_tokens),
        (
            "kv_evictions",
            "Cached KV blocks that were evicted.",
            stats.evictions,
        ),
        ("state_snapshots", taken, stats.snapshots.taken),
        ("state_snapshot_hits", hits, stats.snapshots.hits),
        (
            "state_snapshot_evictions",
            "Snapshots that were evicted for other states.",
            stats.snapshots.evictions,
        ),
        ("session_log_failures", log_failures, stats.log_failures),
        ("session_log_rewrites", log_rewrites, stats.log_rewrites),
        (
            "panics",
            "Panics of the core that were caught; each failed one request.",
            stats.panics,
        ),
    ] {
        out.value(&format!("lmserve_{name}_total"), "counter", help, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histograms_buckets_add_up() {
        let mut histogram = Histogram::default();
        for ms in [0, 1, 2, 3000, 500_000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut out = Writer(String::new());
        out.histogram("x_seconds", "Help.", &histogram);
        let lines: Vec<&str> = out.0.lines().collect();
        assert_eq!(lines[0], "# HELP x_seconds Help.");
        assert_eq!(lines[1], "# TYPE x_seconds histogram");
        assert_eq!(lines[2], "x_seconds_bucket{le=\"0.001\"} 2");
        assert_eq!(lines[3], "x_seconds_bucket{le=\"0.0025\"} 3");
        assert!(lines.contains(&"x_seconds_bucket{le=\"10\"} 4"));
        assert!(lines.contains(&"x_seconds_bucket{le=\"+Inf\"} 5"));
        assert!(lines.contains(&"x_seconds_sum 503.003"));
        assert_eq!(lines.last(), Some(&"x_seconds_count 5"));
    }
}
