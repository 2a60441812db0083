//! What a capacity run is given: a trace, a server's sizes, and how long its steps take.

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::kv::BlockPool;
use crate::sched::{SchedulerConfig, Step};

/// Token ids of a simulated prompt lie below.
pub(super) const VOCAB_SIZE: usize = 1 << 30;
const MAX_SECONDS: f64 = 1e9;
const MAX_MS: f64 = 1e6;
const MAX_REPLICAS: usize = 100_000;

/// One line of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceRequest {
    /// Seconds since the trace began.
    pub arrival: f64,
    /// New tokens; the history of its session comes before them.
    pub prompt_tokens: usize,
    /// Tokens that are generated.
    pub output_tokens: usize,
    /// Its conversation; a turn does not begin before the one before it has ended.
    #[serde(default)]
    pub session: Option<i64>,
    /// Leading tokens of the prompt that are the same in all requests, such as a system prompt.
    #[serde(default)]
    pub shared_tokens: usize,
}

impl TraceRequest {
    /// The requests of JSON lines, by arrival.
    ///
    /// # Errors
    /// `invalid_value` that names the line.
    pub fn parse_lines(lines: &[u8]) -> Result<Vec<Self>> {
        let mut requests = Vec::new();
        for (at, line) in lines.split(|&byte| byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let wrong = |what: String| {
                Error::invalid("trace", format!("line {} of the trace: {what}", at + 1))
            };
            let request: Self = serde_json::from_slice(line).map_err(|e| wrong(e.to_string()))?;
            request.check().map_err(wrong)?;
            requests.push(request);
        }
        if requests.is_empty() {
            return Err(Error::invalid("trace", "the trace has no request"));
        }
        requests.sort_by(|a, b| a.arrival.total_cmp(&b.arrival));
        Ok(requests)
    }

    fn check(&self) -> std::result::Result<(), String> {
        if !(0.0..=MAX_SECONDS).contains(&self.arrival) {
            let given = self.arrival;
            return Err(format!(
                "arrival must lie in [0, {MAX_SECONDS}], but {given} was given"
            ));
        }
        if self.prompt_tokens == 0 || self.output_tokens == 0 {
            return Err("prompt_tokens and output_tokens must be at least 1".into());
        }
        if self.shared_tokens > self.prompt_tokens {
            let (shared, prompt) = (self.shared_tokens, self.prompt_tokens);
            return Err(format!(
                "shared_tokens is {shared}, but the prompt has only {prompt} tokens"
            ));
        }
        Ok(())
    }
}

/// How long a step takes: a sum of parts, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StepModel {
    /// Of every step: reading the weights, launching kernels.
    pub base_ms: f64,
    /// Of each sequence that decodes: one token through the layers, and its sampling.
    pub decode_ms: f64,
    /// Of each token that a decoding sequence attends to.
    pub decode_context_ms: f64,
    /// Of each token of a prompt.
    pub prefill_ms: f64,
    /// Of each pair of a prompt's token and a token that it attends to.
    pub prefill_context_ms: f64,
    /// Of each prompt that ends in the step, for sampling its first token.
    pub prompt_end_ms: f64,
}

impl Default for StepModel {
    fn default() -> Self {
        Self {
            base_ms: 0.0,
            decode_ms: 0.0,
            decode_context_ms: 0.0,
            prefill_ms: 0.0,
            prefill_context_ms: 0.0,
            prompt_end_ms: 0.0,
        }
    }
}

impl StepModel {
    fn parts(&self) -> [(&'static str, f64); 6] {
        [
            ("base_ms", self.base_ms),
            ("decode_ms", self.decode_ms),
            ("decode_context_ms", self.decode_context_ms),
            ("prefill_ms", self.prefill_ms),
            ("prefill_context_ms", self.prefill_context_ms),
            ("prompt_end_ms", self.prompt_end_ms),
        ]
    }

    fn check(&self) -> Result<()> {
        for (name, value) in self.parts() {
            if !(0.0..=MAX_MS).contains(&value) {
                let message = format!("{name} must lie in [0, {MAX_MS}], but {value} was given");
                return Err(Error::invalid("step_model", message));
            }
        }
        if self.base_ms == 0.0 {
            let message = "base_ms must be greater than 0: a step takes a time";
            return Err(Error::invalid("step_model", message));
        }
        Ok(())
    }

    /// Seconds that `step` takes.
    pub fn seconds(&self, step: &Step) -> f64 {
        let (mut decoding, mut context, mut tokens, mut pairs, mut ends) = (0, 0, 0, 0, 0);
        for (scheduled, &length) in step.scheduled.iter().zip(&step.context_lens) {
            let (new, length) = (scheduled.new_tokens, length as usize);
            if new == 1 && scheduled.samples {
                decoding += 1;
                context += length;
            } else {
                tokens += new;
                pairs += new * (length - new) + new * (new + 1) / 2;
                ends += usize::from(scheduled.samples);
            }
        }
        let milliseconds = self.base_ms
            + self.decode_ms * f64::from(decoding)
            + self.decode_context_ms * context as f64
            + self.prefill_ms * tokens as f64
            + self.prefill_context_ms * pairs as f64
            + self.prompt_end_ms * ends as f64;
        milliseconds / 1e3
    }
}

/// The servers that the trace is put on.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Setup {
    pub step_model: StepModel,
    pub max_batch: usize,
    pub max_batch_tokens: usize,
    pub max_model_len: usize,
    pub max_queue: usize,
    pub num_blocks: usize,
    pub block_size: usize,
    pub prefix_cache: bool,
    /// Tokens that layers with a window see, and the blocks that these layers have; 0: there are none.
    #[serde(default)]
    pub window: usize,
    #[serde(default)]
    pub num_window_blocks: usize,
    /// Servers; a session stays on its own, other requests go to each in turn.
    pub replicas: usize,
}

impl Setup {
    /// From one JSON object.
    ///
    /// # Errors
    /// `invalid_value` with the limit and what was given.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let setup: Self = serde_json::from_slice(json)
            .map_err(|e| Error::invalid("setup", format!("malformed setup: {e}")))?;
        setup.step_model.check()?;
        for (name, value, limit) in [
            ("replicas", setup.replicas, MAX_REPLICAS),
            ("num_blocks", setup.num_blocks, 1 << 26),
            ("block_size", setup.block_size, 4096),
            ("max_batch", setup.max_batch, 65_536),
        ] {
            if !(1..=limit).contains(&value) {
                let message = format!("{name} must lie in [1, {limit}], but {value} was given");
                return Err(Error::invalid(name, message));
            }
        }
        if setup.num_window_blocks > 0 {
            let least = setup.pool().least_window_blocks(setup.max_batch_tokens);
            if setup.num_window_blocks < least {
                let given = setup.num_window_blocks;
                let message = format!(
                    "num_window_blocks must be at least {least} for a step of one sequence, but {given} was given"
                );
                return Err(Error::invalid("num_window_blocks", message));
            }
        }
        Ok(setup)
    }

    /// The server's blocks.
    pub(super) fn pool(&self) -> BlockPool {
        let windows = self.num_window_blocks.min(self.num_blocks);
        BlockPool::new(self.num_blocks, self.block_size, self.prefix_cache)
            .with_windows(self.window, windows)
    }

    pub(super) const fn scheduler(&self) -> SchedulerConfig {
        SchedulerConfig {
            max_batch: self.max_batch,
            max_batch_tokens: self.max_batch_tokens,
            max_model_len: self.max_model_len,
            max_queue: self.max_batch + self.max_queue,
        }
    }
}
