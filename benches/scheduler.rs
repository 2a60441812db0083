//! What one step costs the scheduler (plan and commit together) with all sequences decoding, prefix cache on, beside idle
//! sessions. No text and no model: `cargo bench --no-default-features --bench scheduler`.
#![allow(missing_docs)]

use std::sync::{Arc, Mutex};

use lmserve::engine::{Core, Events, FinishedTurn, StepOutput, TurnGuard, prepare};
use lmserve::engine::{Limits, Prepared};
use lmserve::error::Error;
use lmserve::kv::BlockPool;
use lmserve::request::Submission;
use lmserve::sched::{FinishReason, Scheduler, SchedulerConfig, Speculation};
use lmserve::session::{SessionKey, SessionStore, Start, StoreLimits};
use lmserve::wire::{Delta, Usage};
use serde_json::json;

const BLOCK_SIZE: usize = 16;
const STEPS: usize = 1000;
const VOCAB: u32 = 32_000;
const IDLE_TOKENS: u32 = 32;

/// Commits turns at that time, and says nothing.
struct Silent(u64);

impl Events for Silent {
    fn delta(&mut self, _: u64, _: usize, _: Delta) {}
    fn finish(
        &mut self,
        _: u64,
        _: usize,
        _: Delta,
        _: FinishReason,
        _: Usage,
        turn: Option<FinishedTurn>,
    ) {
        if let Some(turn) = turn {
            turn.commit(self.0);
        }
    }
    fn fail(&mut self, _: u64, _: &Error, _: Usage) {}
}

/// Tokens of a sequence at its end, which no bench reaches.
const fn most_tokens(context: usize) -> usize {
    2 * context + 2 * STEPS + BLOCK_SIZE
}

struct Load {
    core: Core,
    store: Arc<Mutex<SessionStore>>,
    output: StepOutput,
    limits: Limits,
    next: u64,
    now_ms: u64,
    token: u32,
}

impl Load {
    fn new(running: usize, context: usize, idle: usize, speculation: Option<Speculation>) -> Self {
        let idle_blocks = idle * (IDLE_TOKENS as usize / BLOCK_SIZE + 1);
        let num_blocks = running * (most_tokens(context) / BLOCK_SIZE + 1) + idle_blocks;
        let config = SchedulerConfig {
            max_batch: running + 1,
            max_batch_tokens: 8192,
            max_model_len: 1 << 20,
            max_queue: running.max(1024),
        };
        let pool = Arc::new(BlockPool::new(num_blocks, BLOCK_SIZE, true));
        let scheduler = Scheduler::new(config, pool).unwrap();
        let scheduler = scheduler.with_speculation(speculation);
        let limits = Limits {
            context_length: scheduler.max_tokens(),
            vocab_size: VOCAB as usize,
            keeps_borders: false,
        };
        let limit = StoreLimits {
            max_sessions: usize::MAX,
            ttl_ms: 0,
        };
        Self {
            core: Core::new(scheduler, None, vec![]),
            store: Arc::new(Mutex::new(SessionStore::new(limit))),
            output: StepOutput::default(),
            limits,
            next: 1,
            now_ms: 0,
            token: 1,
        }
    }

    fn add(&mut self, ids: &[u32], max_tokens: usize) {
        let id = self.next;
        self.next += 1;
        let json = json!({
            "route": "generate",
            "input": {"type": "tokens", "ids": ids},
            "session": {"id": id, "start": true},
            "stopping": {"max_tokens": max_tokens},
        });
        let submission = Submission::parse(json.to_string().as_bytes()).unwrap();
        let key = SessionKey::new(0, id as i64);
        let (lease, base) =
            TurnGuard::begin(&self.store, key, id, Start::Fresh, self.now_ms).unwrap();
        let prepared: Prepared =
            prepare(&submission, base, None, None, self.limits, &|| Ok(())).unwrap();
        self.core
            .add(id, &submission, prepared, Some(lease), id)
            .unwrap();
    }

    fn distinct(&mut self, count: usize) -> Vec<u32> {
        (0..count)
            .map(|_| {
                self.token = self.token.wrapping_mul(1_664_525).wrapping_add(12_345);
                (self.token >> 8) % VOCAB
            })
            .collect()
    }

    fn step(&mut self) -> bool {
        self.now_ms += 1;
        let step = self.core.plan();
        if step.is_empty() {
            return false;
        }
        self.output.tokens.clear();
        for row in 0..step.num_rows() {
            self.output
                .tokens
                .push((row as u32 * 31 + self.now_ms as u32) % VOCAB);
        }
        self.core
            .commit(&self.output, &mut Silent(self.now_ms))
            .unwrap();
        true
    }
}

/// Time this thread has computed, in microseconds: what other processes of a shared machine do is no part of it.
fn thread_time() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for writing.
    let outcome = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(outcome, 0);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

/// Microseconds of a step: the median over spans of `BLOCK_SIZE` steps, in which each sequence fills one block, and the worst.
fn measure(
    running: usize,
    context: usize,
    idle: usize,
    waits: bool,
    speculation: Option<Speculation>,
) -> (f64, f64) {
    let mut load = Load::new(running, context, idle, speculation);
    for start in (0..idle).step_by(1000) {
        for _ in start..(start + 1000).min(idle) {
            let ids = load.distinct(IDLE_TOKENS as usize);
            load.add(&ids, 0);
        }
        while load.step() {}
    }
    for at in 0..running {
        let ids = load.distinct(context + at % BLOCK_SIZE);
        load.add(&ids, 2 * STEPS + context);
    }
    let decoding = |load: &Load| {
        let sequences = load.core.scheduler().running();
        sequences.filter(|s| !s.output().is_empty()).count()
    };
    while decoding(&load) < running {
        load.step();
    }
    if waits {
        // There is room for its prompt now, but not when the others will have all their tokens.
        let ids = load.distinct(running * 4 * BLOCK_SIZE);
        load.add(&ids, 2 * STEPS + 2 * context);
    }
    let mut times: Vec<f64> = (0..STEPS / BLOCK_SIZE)
        .map(|_| {
            let start = thread_time();
            for _ in 0..BLOCK_SIZE {
                load.step();
            }
            (thread_time() - start) / BLOCK_SIZE as f64
        })
        .collect();
    assert_eq!(decoding(&load), running);
    assert_eq!(load.core.scheduler().stats().waiting, usize::from(waits));
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() - 1])
}

fn main() {
    println!("running  context  idle sessions   median us  worst us");
    for running in [64, 256, 1024] {
        for context in [512, 4096] {
            for idle in [0, 100_000] {
                let (median, p99) = measure(running, context, idle, false, None);
                println!("{running:7}  {context:7}  {idle:13}  {median:10.1} {p99:8.1}");
            }
        }
        let (median, p99) = measure(running, 512, 0, true, None);
        println!("{running:7}      512      one waits  {median:10.1} {p99:8.1}");
        // Each sequence is followed, and its text never repeats itself.
        let speculation = Speculation {
            max_draft: 8,
            max_rows: 2 * running,
            row_cost: 0.3,
        };
        let (median, p99) = measure(running, 512, 0, false, Some(speculation));
        println!("{running:7}      512   with drafts  {median:10.1} {p99:8.1}");
    }
}
