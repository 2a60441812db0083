//! A model that loses its memory, as a process that is started again does: what runs is computed anew, and nothing is found in a cache.

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::toy_engine::{BLOCK_SIZE, BLOCKS, VOCAB, config, model, reply};
use lmserve::engine::{
    Engine, EngineConfig, Executor, MEMORY_LOST, StepOutput, WORKER_UNAVAILABLE, WindowSizes,
};
use lmserve::error::{Error, Kind, Result};
use lmserve::request::SessionId;
use lmserve::sched::Step;
use lmserve::session::SessionKey;
use lmserve::sim::ToyModel;
use serde_json::{Value, json};

/// A toy model whose steps (counted from 1) lose its memory, each with the code of its error.
struct Forgetful {
    make: fn() -> ToyModel,
    model: ToyModel,
    steps: u64,
    losses: Arc<Mutex<BTreeMap<u64, &'static str>>>,
}

impl Executor for Forgetful {
    fn launch(&mut self, step: &Step) -> Result<()> {
        self.steps += 1;
        if let Some(code) = self.losses.lock().unwrap().remove(&self.steps) {
            self.model = (self.make)();
            return Err(Error::new(Kind::Unavailable, code, "the memory is lost"));
        }
        self.model.launch(step)
    }

    fn collect(&mut self, step: &Step, output: &mut StepOutput) -> Result<()> {
        self.model.collect(step, output)
    }

    fn embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Vec<f32>> {
        self.model.embed(token_ids, cu_seqlens)
    }
}

fn full() -> ToyModel {
    ToyModel::new(BLOCKS, BLOCK_SIZE, VOCAB)
}

fn hybrid() -> ToyModel {
    full().with_states(16)
}

fn windowed() -> ToyModel {
    full().with_windows(8, BLOCKS)
}

fn sizes(of: fn() -> ToyModel) -> EngineConfig {
    let mut config = config();
    if std::ptr::fn_addr_eq(of, hybrid as fn() -> ToyModel) {
        config.state_slots = 16;
        config.state_every = 8;
    }
    if std::ptr::fn_addr_eq(of, windowed as fn() -> ToyModel) {
        config.windows = Some(WindowSizes {
            window: 8,
            num_blocks: BLOCKS,
        });
    }
    config
}

fn start(make: fn() -> ToyModel, losses: &[(u64, &'static str)]) -> Engine {
    let losses = Arc::new(Mutex::new(losses.iter().copied().collect()));
    let executor = Forgetful {
        make,
        model: make(),
        steps: 0,
        losses,
    };
    Engine::start(&sizes(make), model(), Box::new(executor)).unwrap()
}

fn submit(engine: &Engine, ids: &[u32], session: &Value) -> lmserve::engine::Stream {
    let request = json!({
        "route": "generate",
        "input": {"type": "tokens", "ids": ids},
        "session": session,
        "stopping": {"max_tokens": 12},
    });
    engine.submit(request.to_string().as_bytes(), 1).unwrap()
}

fn tokens(engine: &Engine) -> Vec<u32> {
    let id = SessionId::Number(7);
    let state = engine.session_state(&SessionKey { tenant: 0, id });
    state.unwrap().tokens.to_vec()
}

#[test]
fn what_runs_when_the_memory_is_lost_gets_the_tokens_that_it_would_have_got() {
    for make in [full as fn() -> ToyModel, hybrid, windowed] {
        let expected = {
            let engine = start(make, &[]);
            for turn in [vec![3; 20], vec![4; 5]] {
                reply(&submit(&engine, &turn, &json!({"id": 7, "create": true}))).unwrap();
            }
            tokens(&engine)
        };
        for step in [1, 2, 5, 12, 14, 20] {
            let engine = start(make, &[(step, MEMORY_LOST)]);
            for turn in [vec![3; 20], vec![4; 5]] {
                reply(&submit(&engine, &turn, &json!({"id": 7, "create": true}))).unwrap();
            }
            assert_eq!(tokens(&engine), expected, "step {step}");
            // The toy model fails for what it has never written: nothing that was cached before is used.
            assert_eq!(engine.stats().failed_steps, 1);
        }
    }
}

#[test]
fn all_open_requests_fail_when_the_process_that_computes_is_down() {
    for make in [full as fn() -> ToyModel, hybrid, windowed] {
        let engine = start(make, &[(16, WORKER_UNAVAILABLE)]);
        reply(&submit(
            &engine,
            &[3; 20],
            &json!({"id": 7, "create": true}),
        ))
        .unwrap();
        let before = tokens(&engine);
        let open = [
            submit(&engine, &[4; 5], &json!({"id": 7})),
            submit(&engine, &[5; 9], &json!({"id": 8, "create": true})),
        ];
        let mut failed = 0;
        for stream in &open {
            match reply(stream) {
                Ok(answer) => assert!(answer["finish_reason"] == "length", "{answer}"),
                Err(error) => {
                    assert_eq!(
                        (error.kind, error.code),
                        (Kind::Unavailable, WORKER_UNAVAILABLE)
                    );
                    failed += 1;
                }
            }
        }
        assert!(failed > 0);
        // The session is where it was, unless the second request alone came too late to be seen.
        if failed == 2 {
            assert_eq!(tokens(&engine), before);
        }
        let answer = reply(&submit(&engine, &[6; 4], &json!({"id": 7}))).unwrap();
        assert_eq!(answer["finish_reason"], "length");
        assert_eq!(engine.stats().owned_blocks, 0);
    }
}
