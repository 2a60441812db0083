//! Sequences over the toy model, for tests of the scheduler alone.

use std::ops::Range;
use std::sync::Arc;

use lmserve::request::SamplingParams;
use lmserve::sched::NewSequence;
use lmserve::sim::next_token;

pub const VOCAB: usize = 50;

pub fn sequence(id: u64, prompt: Vec<u32>, max_tokens: usize) -> NewSequence {
    NewSequence {
        id,
        tenant: 0,
        adapter: 0,
        priority: 0,
        prompt,
        max_tokens,
        min_tokens: 0,
        stop_tokens: Arc::new([]),
        sampling: SamplingParams::default(),
        seed: 0,
        prompt_logprobs: None,
        guided: false,
        borders: Vec::new(),
    }
}

/// Sequences that end with their first token, though they may have many: after them, short answers are expected of all that may
/// end by themselves.
pub fn short_answers(ids: Range<u64>) -> impl Iterator<Item = NewSequence> {
    ids.map(|id| NewSequence {
        stop_tokens: (0..VOCAB as u32).collect(),
        ..sequence(id, vec![id as u32 % 50], 20)
    })
}

/// As [`sequence`], but as far as anybody knows it may end before its limit.
pub fn open_ended(id: u64, prompt: Vec<u32>, max_tokens: usize) -> NewSequence {
    NewSequence {
        stop_tokens: Arc::new([VOCAB as u32]),
        ..sequence(id, prompt, max_tokens)
    }
}

/// What a sequence comes to with nothing beside it.
pub fn alone(prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..max_tokens {
        tokens.push(next_token(&tokens, VOCAB));
    }
    tokens
}
