//! A panic fails the one request that it happened to: its client hears of it, and the others go on.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::toy_engine::{BLOCK_SIZE, BLOCKS, VOCAB, config, model, reply};
use lmserve::engine::{Engine, Executor, StepOutput};
use lmserve::error::Result;
use lmserve::panics::caught;
use lmserve::request::Submission;
use lmserve::sched::Step;
use lmserve::sim::ToyModel;
use lmserve::wire::{Mailbox, Poll, Reply, Wake};
use serde_json::json;

/// A toy model that panics where it is given this token.
struct Panicking(ToyModel);

const UNLUCKY: i32 = 13;

impl Executor for Panicking {
    fn launch(&mut self, step: &Step) -> Result<()> {
        assert!(!step.token_ids.contains(&UNLUCKY), "an unlucky token");
        self.0.launch(step)
    }

    fn collect(&mut self, step: &Step, output: &mut StepOutput) -> Result<()> {
        self.0.collect(step, output)
    }

    fn embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Vec<f32>> {
        assert!(!token_ids.contains(&UNLUCKY), "an unlucky token");
        self.0.embed(token_ids, cu_seqlens)
    }
}

#[test]
fn a_panic_while_embedding_fails_that_request_alone() {
    let executor = Panicking(ToyModel::new(BLOCKS, BLOCK_SIZE, VOCAB));
    let engine = Engine::start(&config(), model(), Box::new(executor)).unwrap();
    let embed = |token: i32| {
        let submission = json!({"model": "toy", "inputs": [{"ids": [token]}]});
        engine.embed(submission.to_string().as_bytes()).unwrap()
    };
    let before = caught();
    let error = reply(&embed(UNLUCKY)).unwrap_err();
    assert_eq!((error.kind.status(), error.code), (500, "internal_error"));
    // The panic is counted once the request has been failed, so a request behind it is waited for first.
    let whole = reply(&embed(7)).unwrap();
    assert_eq!(whole["data"][0]["object"], "embedding");
    assert!(caught() > before);
    assert!(engine.stats().panics > before);
    assert!(engine.metrics().contains("lmserve_panics_total "));
    assert_eq!(engine.stats().open_requests, 0);
    engine.shutdown(Duration::ZERO);
}

fn submission(stream: bool) -> Submission {
    let request = json!({
        "reply_id": "r", "model": "m", "created": 1, "route": "generate", "stream": stream,
        "input": {"type": "tokens", "ids": [1]},
    });
    Submission::parse(request.to_string().as_bytes()).unwrap()
}

#[test]
fn a_reply_that_is_dropped_tells_its_client() {
    let wake = Arc::new(Wake::new().unwrap());
    let mailbox = Mailbox::new(1, Arc::clone(&wake));
    drop(Reply::new(&submission(true), Arc::clone(&mailbox)).unwrap());
    assert_eq!(wake.drain(), [1]);
    let Poll::Failed(error) = mailbox.poll() else {
        panic!("nobody was told");
    };
    assert_eq!((error.kind.status(), error.code), (500, "internal_error"));

    // After its first byte the error is the stream's last frame.
    let mailbox = Mailbox::new(2, Arc::clone(&wake));
    let mut reply = Reply::new(&submission(true), Arc::clone(&mailbox)).unwrap();
    reply.accept(1, 0);
    mailbox.write(|out| out.extend_from_slice(b"{}\0"));
    drop(reply);
    let Poll::Ended(bytes) = mailbox.poll() else {
        panic!("the stream goes on");
    };
    let text = String::from_utf8(bytes).unwrap();
    assert!(text.contains(r#""finish_reason": "error""#), "{text}");
}

#[test]
fn an_engine_whose_thread_panics_is_down_and_says_so() {
    let executor = Panicking(ToyModel::new(BLOCKS, BLOCK_SIZE, VOCAB));
    let engine = Engine::start(&config(), model(), Box::new(executor)).unwrap();
    assert_eq!(engine.check_health(), Ok(()));
    let request = json!({
        "route": "generate", "input": {"type": "tokens", "ids": [UNLUCKY]}, "stopping": {"max_tokens": 3},
    });
    let stream = engine.submit(request.to_string().as_bytes(), 0).unwrap();
    assert!(reply(&stream).is_err());
    let error = engine.check_health().unwrap_err();
    assert_eq!(error.code, "engine_unavailable");
    assert_eq!(error.message, "the engine is down: its thread panicked");
    assert!(engine.metrics().contains("lmserve_healthy 0"));
    let refused = engine
        .submit(request.to_string().as_bytes(), 0)
        .unwrap_err();
    assert_eq!(refused.message, error.message);
}
