//! The engine over a toy model: sessions, aborts, faults, shutdown. Token ids in, usage and session tokens out.
#![allow(clippy::needless_pass_by_value)]

mod common;

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use common::toy_engine::{BLOCK_SIZE, BLOCKS, VOCAB, config, model, reply};
use lmserve::engine::{Engine, Executor, StepOutput, Stream, sequence_id};
use lmserve::error::{Kind, Result};
use lmserve::request::SessionId;
use lmserve::sched::Step;
use lmserve::session::SessionKey;
use lmserve::sim::{ToyModel, next_token};
use serde_json::{Value, json};

const KEY: SessionKey = SessionKey {
    tenant: 0,
    id: SessionId::Number(7),
};

/// A toy model that takes one permit for each step, and waits for it.
struct Gated {
    model: ToyModel,
    gate: Arc<(Mutex<u64>, Condvar)>,
}

impl Executor for Gated {
    fn launch(&mut self, step: &Step) -> Result<()> {
        let (permits, changed) = &*self.gate;
        let mut permits = changed
            .wait_while(permits.lock().unwrap(), |permits| *permits == 0)
            .unwrap();
        *permits -= 1;
        drop(permits);
        self.model.launch(step)
    }

    fn collect(&mut self, step: &Step, output: &mut StepOutput) -> Result<()> {
        self.model.collect(step, output)
    }

    fn embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Vec<f32>> {
        self.model.embed(token_ids, cu_seqlens)
    }
}

struct Server {
    engine: Engine,
    gate: Arc<(Mutex<u64>, Condvar)>,
}

impl Server {
    fn start(failing_steps: Vec<u64>) -> Self {
        Self::start_with(|toy| toy.failing_steps = failing_steps)
    }

    fn start_with(prepare: impl FnOnce(&mut ToyModel)) -> Self {
        let mut toy = ToyModel::new(BLOCKS, BLOCK_SIZE, VOCAB);
        prepare(&mut toy);
        let gate = Arc::new((Mutex::new(u64::MAX), Condvar::new()));
        let executor = Box::new(Gated {
            model: toy,
            gate: Arc::clone(&gate),
        });
        Self {
            engine: Engine::start(&config(), model(), executor).unwrap(),
            gate,
        }
    }

    /// Lets the model compute that many more steps.
    fn permit(&self, steps: u64) {
        *self.gate.0.lock().unwrap() = steps;
        self.gate.1.notify_all();
    }

    fn submit(&self, ids: &[u32], max_tokens: u32, session: Value) -> Result<Stream> {
        let request = json!({
            "route": "generate",
            "input": {"type": "tokens", "ids": ids},
            "session": session,
            "stopping": {"max_tokens": max_tokens},
        });
        self.engine.submit(request.to_string().as_bytes(), 1)
    }

    fn turn(&self, ids: &[u32], max_tokens: u32, session: Value) -> Value {
        reply(&self.submit(ids, max_tokens, session).unwrap()).unwrap()
    }

    fn tokens(&self) -> Vec<u32> {
        self.engine.session_state(&KEY).unwrap().tokens.to_vec()
    }

    /// Waits until the engine is idle, then checks that nothing is left of its requests.
    fn assert_baseline(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let stats = self.engine.stats();
            if stats.open_requests == 0
                && stats.scheduler.running + stats.scheduler.waiting == 0
                && stats.owned_blocks == 0
            {
                assert_eq!(stats.free_blocks + stats.cached_blocks, BLOCKS);
                return;
            }
            assert!(Instant::now() < deadline, "{stats:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "not so after 10 s");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn session(start: bool) -> Value {
    json!({"id": KEY.id, "start": start})
}

fn code(outcome: Result<Stream>) -> (Kind, &'static str) {
    let error = outcome.map(drop).unwrap_err();
    (error.kind, error.code)
}

fn generate(history: &mut Vec<u32>, count: usize) {
    for _ in 0..count {
        history.push(next_token(history, VOCAB));
    }
}

#[test]
fn a_conversation_is_that_of_its_token_history_and_computes_nothing_twice() {
    let server = Server::start(vec![]);
    let mut history = Vec::new();
    for turn in 0..6_u32 {
        let input: Vec<u32> = (0..5 + turn).map(|i| (i * 3 + turn) % 50).collect();
        let before = history.len();
        let reply = server.turn(&input, 6, session(turn == 0));
        history.extend(&input);
        generate(&mut history, 6);
        assert_eq!(server.tokens(), history);
        assert_eq!(reply["usage"]["history_tokens"], before);
        assert_eq!(reply["usage"]["prompt_tokens"], before + input.len());
        // The last token was sampled and never computed.
        let cached = before.saturating_sub(1);
        assert_eq!(reply["usage"]["cached_tokens"], cached, "turn {turn}");
        assert_eq!(
            (&reply["finish_reason"], &reply["tokens"]),
            (&json!("length"), &json!(6))
        );
    }
    server.assert_baseline();
}

#[test]
fn a_client_that_leaves_rolls_the_turn_back_or_keeps_it() {
    let server = Server::start(vec![]);
    server.turn(&[1, 2, 3], 4, session(true));
    let committed = server.tokens();
    for keep in [false, true] {
        let policy = if keep { "keep" } else { "rollback" };
        server.assert_baseline();
        let steps = server.engine.stats().scheduler.steps;
        server.permit(4);
        let stream = server
            .submit(&[9], 200, json!({"id": 7, "on_disconnect": policy}))
            .unwrap();
        wait_until(|| server.engine.stats().scheduler.steps == steps + 4);
        drop(stream);
        server.permit(u64::MAX);
        wait_until(|| !server.engine.session_info(&KEY).unwrap().busy);
        if keep {
            // Four steps, and the one that was on its way when the client left.
            let mut history = [committed.as_slice(), &[9]].concat();
            generate(&mut history, 5);
            assert_eq!(server.tokens(), history);
        } else {
            assert_eq!(server.tokens(), committed);
        }
        server.assert_baseline();
    }
    let mut history = server.tokens();
    server.turn(&[4], 3, session(false));
    history.push(4);
    generate(&mut history, 3);
    assert_eq!(server.tokens(), history);
}

#[test]
fn a_cancelled_turn_keeps_what_was_generated() {
    let server = Server::start(vec![]);
    assert!(!server.engine.cancel_session(&KEY));
    server.permit(4);
    let stream = server.submit(&[1, 2], 200, session(true)).unwrap();
    wait_until(|| server.engine.stats().scheduler.sampled_tokens == 4);
    assert!(server.engine.cancel_session(&KEY));
    server.permit(u64::MAX);
    let reply = reply(&stream).unwrap();
    assert_eq!(
        (&reply["finish_reason"], &reply["tokens"]),
        (&json!("abort"), &json!(5))
    );
    let mut history = vec![1, 2];
    generate(&mut history, 5);
    assert_eq!(server.tokens(), history);
    server.assert_baseline();
}

#[test]
fn a_first_turn_that_fails_leaves_no_session_and_a_restart_that_fails_leaves_the_old_one() {
    let server = Server::start(vec![2, 5]);
    let error = reply(&server.submit(&[1, 2], 4, session(true)).unwrap()).unwrap_err();
    assert_eq!((error.kind, error.code), (Kind::Internal, "internal_error"));
    assert_eq!(
        server.engine.session_info(&KEY).unwrap_err().code,
        "session_not_found"
    );
    server.turn(&[5], 2, session(true));
    let committed = server.tokens();
    assert!(reply(&server.submit(&[1, 2], 4, session(true)).unwrap()).is_err());
    assert_eq!(server.tokens(), committed);
    server.assert_baseline();
    assert_eq!(server.engine.stats().failed_steps, 2);
}

/// Tokens that each of five requests generates; so many that all five run together before the one at fault has
/// [`FAULTY_TOKENS`] of prompt and reply.
const TOGETHER_TOKENS: u32 = 42;
const FAULTY_TOKENS: usize = 44;

/// Of five requests that run together one is at fault; the others' tokens are those they give alone.
fn one_of_five_fails(server: &Server, faulty: usize, code: &str) {
    server.permit(0);
    let keys = [1, 2, 3, 4, 5];
    let streams = keys.map(|id| {
        let session = json!({"id": id, "start": true});
        server.submit(&[id; 6], TOGETHER_TOKENS, session).unwrap()
    });
    // They are prepared by several threads. The first one alone may take few steps before the last one comes.
    wait_until(|| {
        server.permit(1);
        std::thread::sleep(Duration::from_millis(10));
        server.engine.stats().scheduler.running == keys.len()
    });
    server.permit(u64::MAX);
    for (at, stream) in streams.iter().enumerate() {
        let key = SessionKey::new(0, i64::from(keys[at]));
        if at == faulty {
            let error = reply(stream).unwrap_err();
            assert_eq!((error.kind, error.code), (Kind::Internal, code));
            assert!(server.engine.session_info(&key).is_err());
        } else {
            assert_eq!(reply(stream).unwrap()["tokens"], TOGETHER_TOKENS);
            let mut history = vec![keys[at]; 6];
            generate(&mut history, TOGETHER_TOKENS as usize);
            assert_eq!(*server.engine.session_state(&key).unwrap().tokens, history);
        }
    }
    server.assert_baseline();
}

#[test]
fn a_request_whose_steps_fail_ends_alone() {
    let server = Server::start_with(|toy| toy.failing.extend([(sequence_id(3, 0), FAULTY_TOKENS)]));
    one_of_five_fails(&server, 2, "internal_error");
    assert!(server.engine.stats().failed_steps >= 2);
    let usage = server.engine.stats().scheduler;
    assert_eq!(usage.running + usage.waiting, 0);
}

#[test]
fn a_request_whose_logits_are_not_finite_ends_alone() {
    let server =
        Server::start_with(|toy| toy.not_finite.extend([(sequence_id(5, 0), FAULTY_TOKENS)]));
    one_of_five_fails(&server, 4, "numerical_error");
    assert_eq!(server.engine.stats().failed_steps, 0);
}

#[test]
fn an_embedding_that_is_not_finite_is_an_error_that_names_its_input() {
    let server = Server::start_with(|toy| toy.not_finite_embedding = Some(9));
    let inputs: Vec<Value> = (0..12_u32).map(|n| json!({"ids": vec![n; 10]})).collect();
    let body = json!({"model": "toy", "inputs": inputs}).to_string();
    let error = reply(&server.engine.embed(body.as_bytes()).unwrap()).unwrap_err();
    assert_eq!(
        (error.kind, error.code),
        (Kind::Internal, "numerical_error")
    );
    assert!(error.message.contains("input 9 "), "{}", error.message);
    server.assert_baseline();
}

#[test]
fn a_busy_session_an_unknown_one_and_a_full_server_answer_at_once() {
    let server = Server::start(vec![]);
    assert_eq!(
        code(server.submit(&[1], 1, session(false))),
        (Kind::NotFound, "session_not_found")
    );
    server.permit(0);
    let running = server.submit(&[1], 1, session(true)).unwrap();
    assert_eq!(
        code(server.submit(&[1], 1, session(false))),
        (Kind::Conflict, "session_busy")
    );
    assert_eq!(
        server.engine.end_session(&KEY).unwrap_err().code,
        "session_busy"
    );
    let open: Vec<Stream> = (0..15)
        .map(|_| server.submit(&[2], 1, Value::Null).unwrap())
        .collect();
    assert_eq!(
        code(server.submit(&[1], 1, Value::Null)),
        (Kind::Busy, "queue_full")
    );
    server.permit(u64::MAX);
    reply(&running).unwrap();
    for stream in &open {
        reply(stream).unwrap();
    }
    assert!(server.engine.end_session(&KEY).unwrap());
    assert!(!server.engine.end_session(&KEY).unwrap());
    server.assert_baseline();
}

#[test]
fn a_default_length_is_cut_to_what_the_context_holds() {
    let server = Server::start(vec![]);
    let ask = |prompt: usize, stopping: Value| {
        let body = json!({
            "route": "generate",
            "input": {"type": "tokens", "ids": vec![2; prompt]},
            "stopping": stopping,
        });
        reply(
            &server
                .engine
                .submit(body.to_string().as_bytes(), 1)
                .unwrap(),
        )
        .unwrap()["tokens"]
            .clone()
    };
    assert_eq!(ask(100, json!({"default_max_tokens": 50})), 50);
    assert_eq!(ask(250, json!({"default_max_tokens": 50})), 6);
    assert_eq!(
        ask(100, json!({"default_max_tokens": 50, "max_tokens": 60})),
        60
    );
}

#[test]
fn an_overflow_is_refused_with_the_numbers_or_cut_as_asked() {
    let server = Server::start(vec![]);
    server.turn(&[1; 100], 50, session(true));
    let request = |policy: &str, max_tokens: Value| {
        let body = json!({
            "route": "generate",
            "input": {"type": "tokens", "ids": vec![2; 40]},
            "session": session(false),
            "on_overflow": policy,
            "stopping": {"max_tokens": max_tokens},
        });
        reply(
            &server
                .engine
                .submit(body.to_string().as_bytes(), 1)
                .unwrap(),
        )
    };
    let error = request("error", json!(100)).unwrap_err();
    assert_eq!(error.code, "context_length_exceeded");
    let numbers = [
        "context_length",
        "history_tokens",
        "input_tokens",
        "requested_tokens",
    ]
    .map(|key| error.to_json()[key].clone());
    assert_eq!(numbers, [json!(256), json!(150), json!(40), json!(100)]);
    assert_eq!(server.tokens().len(), 150);
    assert_eq!(
        request("truncate_output", json!(100)).unwrap()["tokens"],
        66
    );
    assert_eq!(server.tokens().len(), 256);
    let reply = request("drop_oldest_turns", json!(100)).unwrap();
    assert_eq!(
        (&reply["tokens"], &reply["usage"]["history_tokens"]),
        (&json!(100), &json!(106))
    );
    assert_eq!(server.tokens().len(), 246);
}

#[test]
fn embeddings_come_back_in_order_and_bad_ones_are_refused() {
    let server = Server::start(vec![]);
    let inputs: Vec<Value> = (0..20_u32).map(|n| json!({"ids": vec![n; 10]})).collect();
    let embed = |inputs: &[Value]| {
        let body = json!({"model": "toy", "inputs": inputs}).to_string();
        server
            .engine
            .embed(body.as_bytes())
            .and_then(|stream| reply(&stream))
    };
    let reply = embed(&inputs).unwrap();
    assert_eq!(reply["usage"]["prompt_tokens"], 200);
    for (n, item) in reply["data"].as_array().unwrap().iter().enumerate() {
        let angle = (n * 10) as f32;
        assert!((item["embedding"][0].as_f64().unwrap() - f64::from(angle.cos())).abs() < 1e-6);
        assert_eq!(item["index"], n);
    }
    for bad in [
        vec![],
        vec![json!({"ids": []})],
        vec![json!({"ids": [50]})],
        vec![json!({"ids": vec![1; 17]})],
    ] {
        assert_eq!(embed(&bad).unwrap_err().kind, Kind::Invalid);
    }
    server.assert_baseline();
}

#[test]
fn shutdown_finishes_what_runs_and_refuses_what_comes() {
    let server = Server::start(vec![]);
    let stream = server.submit(&[1], 100, Value::Null).unwrap();
    server.engine.shutdown(Duration::from_secs(10));
    assert_eq!(reply(&stream).unwrap()["tokens"], 100);
    assert_eq!(
        code(server.submit(&[1], 1, Value::Null)).0,
        Kind::Unavailable
    );

    let server = Server::start(vec![]);
    server.permit(0);
    let stream = server.submit(&[1], 200, session(true)).unwrap();
    server.permit(u64::MAX);
    server.engine.shutdown(Duration::ZERO);
    match reply(&stream) {
        Ok(reply) => assert_eq!(reply["tokens"], 200),
        Err(error) => assert_eq!(error.kind, Kind::Unavailable),
    }
}
