//! The engine over a session log: a new engine goes on where the last one was.

mod common;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::toy_engine::{BLOCK_SIZE, BLOCKS, VOCAB, config, model, reply};
use lmserve::engine::{DurableSessions, Engine, Fsync};
use lmserve::error::Result;
use lmserve::session::{LogOptions, SessionKey};
use lmserve::sim::{ToyModel, next_token};
use serde_json::{Value, json};

fn key(id: i64) -> SessionKey {
    SessionKey::new(0, id)
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let unique = format!("lmserve-{name}-{}", std::process::id());
        Self(std::env::temp_dir().join(unique))
    }

    fn start(&self, fsync: Fsync) -> Engine {
        let mut options = LogOptions::new([3; 32], "toy");
        options.min_garbage = 4096;
        let durable = DurableSessions {
            folder: self.0.clone(),
            fsync,
            options,
        };
        let executor = Box::new(ToyModel::new(BLOCKS, BLOCK_SIZE, VOCAB));
        let config = config();
        let open = durable.open(config.sessions).unwrap();
        Engine::start_durable(&config, model(), executor, open).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

fn turn(engine: &Engine, id: i64, ids: &[u32], start: bool) -> Result<Value> {
    let request = json!({
        "route": "generate",
        "input": {"type": "tokens", "ids": ids},
        "session": {"id": id, "start": start},
        "stopping": {"max_tokens": 6},
    });
    reply(&engine.submit(request.to_string().as_bytes(), 1)?)
}

fn tokens(engine: &Engine, id: i64) -> Vec<u32> {
    engine.session_state(&key(id)).unwrap().tokens.to_vec()
}

#[test]
fn a_new_engine_goes_on_where_the_last_one_was() {
    let folder = Folder::new("engine-restart");
    let mut history = Vec::new();
    for (round, fsync) in [Fsync::Always, Fsync::Interval, Fsync::Never]
        .into_iter()
        .enumerate()
    {
        let engine = folder.start(fsync);
        for at in 0..2_u32 {
            let reply = turn(&engine, 7, &[at, 9], history.is_empty()).unwrap();
            assert_eq!(reply["usage"]["history_tokens"], history.len());
            history.extend([at, 9]);
            for _ in 0..6 {
                history.push(next_token(&history, VOCAB));
            }
            assert_eq!(tokens(&engine, 7), history);
        }
        assert_eq!(engine.session_info(&key(7)).unwrap().turns, 2 * round + 2);
        assert_eq!(engine.stats().log_failures, 0);
    }
}

#[test]
fn what_verbs_did_outlives_the_engine() {
    let folder = Folder::new("engine-verbs");
    let engine = folder.start(Fsync::Interval);
    for id in 0..3 {
        turn(&engine, id, &[1, 2], true).unwrap();
        turn(&engine, id, &[3], false).unwrap();
    }
    engine.fork_session(&key(0), 10.into(), Some(1)).unwrap();
    engine.rewind_session(&key(1), 1).unwrap();
    assert!(engine.end_session(&key(2)).unwrap());
    let first = tokens(&engine, 10);
    drop(engine);
    let engine = folder.start(Fsync::Interval);
    assert_eq!(tokens(&engine, 0)[..first.len()], first);
    assert_eq!(tokens(&engine, 1), first);
    assert_eq!(tokens(&engine, 10), first);
    assert_eq!(
        engine.session_info(&key(2)).unwrap_err().code,
        "session_not_found"
    );
    assert_eq!(engine.list_sessions(0, None, 10).len(), 3);
}

#[test]
fn a_log_does_not_grow_for_ever() {
    let folder = Folder::new("engine-rewrite");
    let engine = folder.start(Fsync::Never);
    for round in 0..200 {
        turn(&engine, round % 3, &[1, 2, 3], true).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while engine.stats().log_rewrites == 0 {
        turn(&engine, 0, &[1, 2, 3], true).unwrap();
        assert!(Instant::now() < deadline, "{:?}", engine.stats());
    }
    assert!(engine.stats().log_bytes < 16_384, "{:?}", engine.stats());
    let expected: Vec<_> = (0..3).map(|id| tokens(&engine, id)).collect();
    drop(engine);
    let engine = folder.start(Fsync::Never);
    let found: Vec<_> = (0..3).map(|id| tokens(&engine, id)).collect();
    assert_eq!(found, expected);
}
