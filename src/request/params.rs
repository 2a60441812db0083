//! How the tokens of an answer are sampled, and when it ends.

use serde::Deserialize;

/// How a token is sampled from the logits.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// 0 is greedy. Range [0, 2].
    pub temperature: f32,
    /// Only the k most likely tokens; 0 is all.
    pub top_k: u32,
    /// Only the most likely tokens whose probabilities add up to this. Range (0, 1].
    pub top_p: f32,
    /// Only tokens at least this likely relative to the best. Range [0, 1].
    pub min_p: f32,
    /// Divides (or multiplies, when negative) logits of tokens seen in prompt or output (Keskar et al. 2019). Range (0, 10].
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens seen in the output. Range [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output. Range [-2, 2].
    pub frequency_penalty: f32,
    /// Token ids, each with what is added to its logit, in [-100, 100].
    pub logit_bias: Vec<(u32, f32)>,
    /// Seeds sampling as a function of (seed, position); absent: random.
    pub seed: Option<u64>,
    /// Number of alternatives to report for each token. Absent: report nothing. 0: only the sampled token's log-probability.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            logprobs: None,
        }
    }
}

/// When generation ends.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StopParams {
    /// Maximum number of tokens to generate. Absent: as many as fit into the context. 0: prefill only.
    pub max_tokens: Option<u32>,
    /// Maximum number of tokens if `max_tokens` is absent, as far as they fit into the context.
    pub default_max_tokens: Option<u32>,
    /// No end or stop token is sampled before this many tokens.
    pub min_tokens: u32,
    /// Strings that end the text; they are not part of it unless `include_stop`.
    pub stop: Vec<String>,
    /// Tokens that end the text, in addition to the model's end tokens.
    pub stop_token_ids: Vec<u32>,
    /// Keep the stop string in the text.
    pub include_stop: bool,
    /// Never stop at an end token.
    pub ignore_eos: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
}

impl Default for StopParams {
    fn default() -> Self {
        Self {
            max_tokens: None,
            default_max_tokens: None,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop: false,
            ignore_eos: false,
            skip_special_tokens: true,
        }
    }
}
