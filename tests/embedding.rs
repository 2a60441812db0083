//! Embedding beside generation: a decode step waits for one pass of bounded size at most.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::toy_engine::{BLOCK_SIZE, VOCAB, config, model, reply};
use lmserve::engine::{Engine, EngineConfig, Executor, ModelSpec, StepOutput};
use lmserve::error::Result;
use lmserve::sched::{SchedulerConfig, Step};
use lmserve::sim::ToyModel;
use serde_json::{Value, json};

/// Most tokens of a pass, as of a step.
const PASS: usize = 64;
const BLOCKS: usize = 16_384;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Step,
    /// So many tokens of texts.
    Pass(usize),
}

/// A toy model that computes texts in passes, and writes down what it is called for.
struct Recorded {
    model: ToyModel,
    calls: Arc<Mutex<Vec<Call>>>,
    /// Tokens that are left of what it has begun, and its embeddings.
    begun: Option<(usize, Vec<f32>)>,
}

impl Executor for Recorded {
    fn launch(&mut self, step: &Step) -> Result<()> {
        self.calls.lock().unwrap().push(Call::Step);
        std::thread::sleep(Duration::from_micros(100));
        self.model.launch(step)
    }

    fn collect(&mut self, step: &Step, output: &mut StepOutput) -> Result<()> {
        self.model.collect(step, output)
    }

    fn embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Vec<f32>> {
        self.model.embed(token_ids, cu_seqlens)
    }

    fn begin_embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Option<Vec<f32>>> {
        let embeddings = self.embed(token_ids, cu_seqlens)?;
        self.begun = Some((token_ids.len(), embeddings));
        self.go_on_embedding()
    }

    fn go_on_embedding(&mut self) -> Result<Option<Vec<f32>>> {
        let (left, embeddings) = self.begun.take().unwrap();
        let tokens = left.min(PASS);
        self.calls.lock().unwrap().push(Call::Pass(tokens));
        if tokens == left {
            return Ok(Some(embeddings));
        }
        self.begun = Some((left - tokens, embeddings));
        Ok(None)
    }
}

fn body(lengths: &[usize]) -> String {
    let inputs: Vec<Value> = lengths
        .iter()
        .map(|&n| json!({"ids": vec![1; n]}))
        .collect();
    json!({"model": "toy", "inputs": inputs}).to_string()
}

#[test]
fn a_decode_step_waits_for_one_pass_of_bounded_size() {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let executor = Box::new(Recorded {
        model: ToyModel::new(BLOCKS, BLOCK_SIZE, VOCAB),
        calls: Arc::clone(&calls),
        begun: None,
    });
    let config = EngineConfig {
        scheduler: SchedulerConfig {
            max_batch_tokens: PASS,
            max_model_len: 60_000,
            ..config().scheduler
        },
        num_blocks: BLOCKS,
        ..config()
    };
    let model = ModelSpec {
        max_embed_len: 1000,
        ..model()
    };
    let engine = Engine::start(&config, model, executor).unwrap();
    let request = json!({
        "route": "generate",
        "input": {"type": "tokens", "ids": [1]},
        "stopping": {"max_tokens": 50_000},
    });
    let answer = engine.submit(request.to_string().as_bytes(), 1).unwrap();
    while calls.lock().unwrap().len() < 3 {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Ten passes of one text, then two of several; and those of another request.
    let first = engine.embed(body(&[600, 20, 30, 40]).as_bytes()).unwrap();
    let second = engine.embed(body(&[5, 130]).as_bytes()).unwrap();
    for (stream, lengths) in [(first, vec![600, 20, 30, 40]), (second, vec![5, 130])] {
        let reply = reply(&stream).unwrap();
        for (item, length) in reply["data"].as_array().unwrap().iter().zip(lengths) {
            let cos = item["embedding"][0].as_f64().unwrap();
            assert!((cos - f64::from((length as f32).cos())).abs() < 1e-6);
        }
    }
    let seen = calls.lock().unwrap().len();
    while calls.lock().unwrap().len() < seen + 3 {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(answer);
    engine.shutdown(Duration::ZERO);
    let calls = calls.lock().unwrap();
    let passes: Vec<usize> = calls
        .iter()
        .filter_map(|call| match call {
            Call::Pass(tokens) => Some(*tokens),
            Call::Step => None,
        })
        .collect();
    assert_eq!(passes.len(), 10 + 2 + 1 + 3, "{passes:?}");
    assert!(passes.iter().all(|&tokens| tokens <= PASS), "{passes:?}");
    for two in calls.windows(2) {
        assert!(two.contains(&Call::Step), "two passes without a step");
    }
}

#[test]
fn a_text_whose_client_has_left_is_not_gone_on_with() {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let executor = Box::new(Recorded {
        model: ToyModel::new(BLOCKS, BLOCK_SIZE, VOCAB),
        calls: Arc::clone(&calls),
        begun: None,
    });
    let model = ModelSpec {
        max_embed_len: 1_000_000,
        ..model()
    };
    let engine = Engine::start(&config(), model, executor).unwrap();
    let left = engine.embed(body(&[1_000_000]).as_bytes()).unwrap();
    while calls.lock().unwrap().is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    left.abort();
    // The next one begins anew.
    let stream = engine.embed(body(&[3]).as_bytes()).unwrap();
    let cos = reply(&stream).unwrap()["data"][0]["embedding"][0]
        .as_f64()
        .unwrap();
    assert!((cos - f64::from(3_f32.cos())).abs() < 1e-6);
    assert_eq!(calls.lock().unwrap().last(), Some(&Call::Pass(3)));
    engine.shutdown(Duration::ZERO);
}
