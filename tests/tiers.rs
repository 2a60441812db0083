//! The engine over tiers below the model's memory: what it computes again, and what it does not.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::no_events::NoEvents;
use common::toy_engine::{BLOCK_SIZE, VOCAB, config, model, reply};
use common::toy_sequences::{alone, sequence};
use lmserve::engine::{Engine, EngineConfig, Executor, StepOutput, TierConfig};
use lmserve::kv::{BlockPool, BlockTable};
use lmserve::sched::{Finished, NewSequence, Scheduler};
use lmserve::sim::{ToyModel, next_token};
use lmserve::tier::{Below, Digest, Key, Kind, Payload, StoreLimits};
use serde_json::json;

const STATE_BYTES: usize = 8;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let unique = format!("lmserve-{name}-{}", std::process::id());
        Self(std::env::temp_dir().join(unique))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Tiers of those sizes; 0 slots: without recurrent layers.
fn tiers(folder: Option<&Folder>, limits: StoreLimits, slots: usize) -> EngineConfig {
    EngineConfig {
        state_slots: slots,
        tiers: Some(TierConfig {
            limits,
            disk: folder.map(|folder| (folder.0.clone(), "--kv-disk".to_owned())),
            fingerprint: vec![1],
            tenants: vec![(0, [0; 32]), (1, [1; 32])],
            block_bytes: BLOCK_SIZE * 4,
            state_bytes: if slots > 0 { STATE_BYTES } else { 0 },
        }),
        ..config()
    }
}

fn on_disk(folder: &Folder, slots: usize) -> EngineConfig {
    let limits = StoreLimits {
        disk: 1 << 20,
        ..StoreLimits::default()
    };
    tiers(Some(folder), limits, slots)
}

fn start(config: &EngineConfig) -> Engine {
    let toy = ToyModel::new(config.num_blocks, BLOCK_SIZE, VOCAB).with_states(config.state_slots);
    Engine::start(config, model(), Box::new(toy)).unwrap()
}

fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32)
        .map(|at| (seed * 7 + at * at) % 50)
        .collect()
}

/// What was computed of a prompt.
fn ask(engine: &Engine, tenant: u32, ids: &[u32]) -> u64 {
    let request = json!({
        "route": "generate",
        "tenant": tenant,
        "input": {"type": "tokens", "ids": ids},
        "stopping": {"max_tokens": 5},
    });
    let stream = engine.submit(request.to_string().as_bytes(), 1).unwrap();
    let usage = &reply(&stream).unwrap()["usage"];
    let count = |name: &str| usage[name].as_u64().unwrap();
    count("prompt_tokens") - count("cached_tokens")
}

/// Waits until nothing more is written.
fn settle(engine: &Engine, files: u64) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while engine.stats().tiers.disk.entries < files {
        assert!(Instant::now() < deadline, "{:?}", engine.stats().tiers);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_new_engine_reads_what_the_last_one_wrote_and_computes_the_rest() {
    let folder = Folder::new("tiers-restart");
    let ids = prompt(1, 90);
    let first = start(&on_disk(&folder, 0));
    let computed = ask(&first, 0, &ids);
    assert_eq!(computed, 90);
    // 90 tokens and the first four of the answer: all were computed.
    settle(&first, 23);
    drop(first);
    let second = start(&on_disk(&folder, 0));
    let computed = ask(&second, 0, &ids);
    // 22 full blocks lie before the last token.
    assert_eq!(computed, 90 - 22 * BLOCK_SIZE as u64);
    let stats = second.stats();
    assert_eq!(stats.tiers.disk.hits, 22);
    assert_eq!(stats.scheduler.cached_tokens, 88);
}

#[test]
fn a_state_comes_back_with_its_blocks_and_only_what_is_new_is_computed() {
    let folder = Folder::new("tiers-states");
    let mut ids = prompt(2, 91);
    let first = start(&on_disk(&folder, 6));
    ask(&first, 0, &ids);
    settle(&first, 24);
    drop(first);
    // The turn ended behind 91 tokens and four of its answer.
    for _ in 0..5 {
        ids.push(next_token(&ids, VOCAB));
    }
    ids.extend([3, 4, 5]);
    let second = start(&on_disk(&folder, 6));
    let computed = ask(&second, 0, &ids);
    assert_eq!(computed, 4);
    assert_eq!(second.stats().tiers.disk.hits, 24);
}

#[test]
fn another_model_and_another_key_find_nothing() {
    let folder = Folder::new("tiers-isolated");
    let ids = prompt(3, 60);
    let first = start(&on_disk(&folder, 0));
    ask(&first, 0, &ids);
    settle(&first, 15);
    drop(first);
    let mut other = on_disk(&folder, 0);
    other.tiers.as_mut().unwrap().fingerprint = vec![2];
    let second = start(&other);
    assert_eq!(ask(&second, 0, &ids), 60);
    drop(second);
    let third = start(&on_disk(&folder, 0));
    assert_eq!(ask(&third, 1, &ids), 60);
    // One that has no name has no content below.
    assert_eq!(ask(&third, 7, &ids), 60);
    assert_eq!(third.stats().tiers.disk.hits, 0);
    assert_eq!(ask(&third, 0, &ids), 4);
}

#[test]
fn damaged_files_are_computed_again() {
    let folder = Folder::new("tiers-damaged");
    let ids = prompt(4, 80);
    let first = start(&on_disk(&folder, 0));
    ask(&first, 0, &ids);
    settle(&first, 20);
    drop(first);
    for file in fs::read_dir(&folder.0).unwrap() {
        let path = file.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
            fs::write(&path, bytes).unwrap();
        }
    }
    let second = start(&on_disk(&folder, 0));
    assert_eq!(ask(&second, 0, &ids), 80);
    assert_eq!(second.stats().tiers.disk.failures, 1);
    // The first block is written again, and the others are found to be damaged when they are next read.
    assert_eq!(second.stats().failed_steps, 0);
}

#[test]
fn what_memory_gives_up_comes_back_from_host_memory() {
    let limits = StoreLimits {
        host_blocks: 1 << 20,
        host_states: 1 << 20,
        disk: 0,
    };
    for slots in [0, 3] {
        let mut config = tiers(None, limits, slots);
        config.num_blocks = 30;
        config.scheduler.max_model_len = 120;
        let engine = start(&config);
        let prompts: Vec<_> = (0..4).map(|seed| prompt(seed, 81)).collect();
        for ids in &prompts {
            assert_eq!(ask(&engine, 0, ids), 81);
        }
        for ids in &prompts[..3] {
            let mut longer = ids.clone();
            for _ in 0..5 {
                longer.push(next_token(&longer, VOCAB));
            }
            longer.push(1);
            let computed = ask(&engine, 0, &longer);
            assert!(
                computed <= 1 + BLOCK_SIZE as u64,
                "{computed} of {slots} slots"
            );
        }
        assert!(engine.stats().tiers.host.hits >= 60);
        assert_eq!(engine.stats().tiers.host.failures, 0);
    }
}

/// Tickets, each with what was read.
type Read = Vec<(u64, Vec<Payload>)>;

/// A disk that has everything, and answers when it is told to.
#[derive(Debug, Clone, Default)]
struct SlowDisk {
    asked: Arc<Mutex<Vec<(u64, usize)>>>,
    read: Arc<Mutex<Read>>,
}

impl Below for SlowDisk {
    fn holds(&self, key: &Key) -> bool {
        key.kind == Kind::Block
    }

    fn wants(&self, _: &Key) -> bool {
        false
    }

    fn wants_evicted(&self, _: &Key) -> bool {
        false
    }

    fn is_busy(&self) -> bool {
        false
    }

    fn fetch(&mut self, ticket: u64, keys: Vec<Key>) {
        self.asked.lock().unwrap().push((ticket, keys.len()));
    }

    fn fetched(&mut self) -> Vec<(u64, Vec<Payload>)> {
        std::mem::take(&mut *self.read.lock().unwrap())
    }

    fn save(&mut self, _: Key, _: Payload, _: bool) {}
}

/// Steps until nothing can be computed; the sequences that ended.
fn run(scheduler: &mut Scheduler, model: &mut ToyModel) -> Vec<Finished> {
    let (mut output, mut finished) = (StepOutput::default(), Vec::new());
    loop {
        scheduler.plan();
        for load in scheduler.take_transfers().loads {
            model.load(load.place, &load.payload).unwrap();
        }
        if scheduler.step().is_empty() {
            return finished;
        }
        model.launch(scheduler.step()).unwrap();
        model.collect(scheduler.step(), &mut output).unwrap();
        scheduler
            .commit(&output.tokens, &mut NoEvents, &mut finished)
            .unwrap();
    }
}

#[test]
fn a_request_that_waits_for_a_slow_disk_holds_up_nobody() {
    let roots = HashMap::from([(0, Digest::root(&[]))]);
    let pool = BlockPool::new(40, BLOCK_SIZE, true).with_names(roots);
    let disk = SlowDisk::default();
    let mut scheduler = Scheduler::new(config().scheduler, Arc::new(pool))
        .unwrap()
        .with_below(Box::new(disk.clone()), 1);
    let mut model = ToyModel::new(40, BLOCK_SIZE, VOCAB);
    let add = |scheduler: &mut Scheduler, id, tenant| {
        let new = NewSequence {
            tenant,
            ..sequence(id, prompt(id as u32, 30), 5)
        };
        scheduler.add(new).unwrap();
    };
    // Of tenant 1 nothing is kept.
    for (id, tenant) in [(1, 0), (2, 0), (3, 1)] {
        add(&mut scheduler, id, tenant);
    }
    let ended = run(&mut scheduler, &mut model);
    assert_eq!(ended.len(), 1);
    assert_eq!(ended[0].sequence.id(), 3);
    assert_eq!(*disk.asked.lock().unwrap(), [(1, 7)]);
    assert_eq!((scheduler.fetching(), scheduler.stats().waiting), (2, 2));
    // One that leaves while its prefix is read is forgotten, and the next one's is read.
    assert!(scheduler.abort(1).is_some());
    disk.read.lock().unwrap().push((1, Vec::new()));
    assert!(run(&mut scheduler, &mut model).is_empty());
    assert_eq!(*disk.asked.lock().unwrap(), [(1, 7), (2, 7)]);
    // Five of the seven blocks could be read.
    let tokens = prompt(2, 30);
    let payload =
        |block: &[u32]| Payload::new(block.iter().flat_map(|t| t.to_le_bytes()).collect());
    let blocks = tokens.chunks_exact(BLOCK_SIZE).take(5).map(payload);
    disk.read.lock().unwrap().push((2, blocks.collect()));
    let ended = run(&mut scheduler, &mut model);
    assert_eq!(ended[0].sequence.cached_tokens(), 5 * BLOCK_SIZE);
    assert_eq!(ended[0].sequence.tokens(), alone(&tokens, 5));
    assert!(scheduler.is_idle());
}

#[test]
fn names_are_a_tenants_own_unless_the_cache_is_shared() {
    let roots = |tenant: u32| (tenant, Digest::root(&[&[tenant as u8]]));
    let names = |pool: BlockPool, tenant| {
        let pool = Arc::new(pool.with_names(HashMap::from([roots(0), roots(1)])));
        let mut table = BlockTable::from_prefix(&pool, tenant, &[]);
        let tokens = [1, 2, 3, 4];
        assert!(table.grow(4));
        table.register(&tokens, 4);
        pool.named_prefixes(tenant, &tokens)
    };
    let pool = || BlockPool::new(4, 2, true);
    assert_eq!(names(pool(), 0).len(), 3);
    assert_ne!(names(pool(), 0), names(pool(), 1));
    assert_eq!(
        names(pool().shared_by_tenants(), 0),
        names(pool().shared_by_tenants(), 1)
    );
    assert_eq!(names(pool(), 2), []);
}
