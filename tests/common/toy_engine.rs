//! An engine over the toy model, for tests of the engine as a whole.

use std::time::{Duration, Instant};

use lmserve::engine::{EngineConfig, ModelSpec, Stream};
use lmserve::error::Result;
use lmserve::sched::{PolicyKind, SchedulerConfig};
use lmserve::session::{LaneLimits, StoreLimits};
use lmserve::wire::Poll;
use serde_json::Value;

pub const VOCAB: usize = 50;
pub const BLOCKS: usize = 64;
pub const BLOCK_SIZE: usize = 4;

pub fn config() -> EngineConfig {
    EngineConfig {
        lanes: LaneLimits::default(),
        scheduler: SchedulerConfig {
            max_batch: 8,
            max_batch_tokens: 64,
            max_model_len: 256,
            max_queue: 8,
        },
        policy: PolicyKind::default(),
        speculation: None,
        state_slots: 0,
        state_every: 64,
        windows: None,
        num_blocks: BLOCKS,
        block_size: BLOCK_SIZE,
        prefix_cache: true,
        share_prefix_cache: false,
        tiers: None,
        sessions: StoreLimits::default(),
        tenants: Vec::new(),
        stall: Duration::from_secs(5),
    }
}

/// Token ids in and out: no text.
pub fn model() -> ModelSpec {
    ModelSpec {
        tokenizer: None,
        template: None,
        eos_tokens: vec![],
        vocab_size: VOCAB,
        embedding_size: 2,
        max_embed_len: 16,
        can_generate: true,
        can_embed: true,
    }
}

/// The whole reply, once it is there.
pub fn reply(stream: &Stream) -> Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut bytes = Vec::new();
    loop {
        match stream.poll() {
            Poll::Waiting => {}
            Poll::Accepted(more) => bytes.extend(more),
            Poll::Ended(more) => {
                bytes.extend(more);
                return Ok(serde_json::from_slice(&bytes).unwrap());
            }
            Poll::Failed(error) => return Err(error),
        }
        assert!(Instant::now() < deadline, "no answer in 10 s");
        std::thread::sleep(Duration::from_micros(100));
    }
}
