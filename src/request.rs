//! What a caller asks for, as it crosses into the core: one JSON object ([`Submission`]), bounded here once. Past
//! [`Submission::parse`] only valid requests exist, whatever route they came by.

mod guide;
mod session_id;
mod tools;
mod types;

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
pub use guide::{Guide, MAX_GUIDE_BYTES, MAX_GUIDE_CHOICES, Whitespace, check_bytes};
pub use session_id::{MAX_NAME_CHARS, SessionId};
pub use tools::{CallForm, CallMember, MAX_TOOLS, ToolChoice, functions};
pub use types::{Function, Types, types_of};

/// Longest list of stop strings of one request.
pub const MAX_STOPS: usize = 64;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;
/// Longest name of a lane, in bytes.
pub const MAX_LANE_BYTES: usize = 256;
/// Most entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Most alternatives reported for a token.
pub const MAX_LOGPROBS: u32 = 20;
/// Most choices of one request.
pub const MAX_CHOICES: u32 = 64;

/// What goes to the model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Input {
    /// One user turn, put through the chat template.
    Turn {
        /// The user's words.
        text: String,
    },
    /// Messages, put through the chat template: a whole conversation, or only what is new in a continued session.
    Messages {
        /// `{role, content, ...}` objects.
        messages: Vec<Value>,
        /// Tool descriptions for templates that know them.
        #[serde(default)]
        tools: Option<Vec<Value>>,
        /// Extra variables for the template.
        #[serde(default)]
        template_kwargs: Map<String, Value>,
        /// Leaves the last assistant message open, to be continued.
        #[serde(default)]
        continue_final_message: bool,
        /// Whether the template opens the assistant's answer; absent: yes, unless nothing is to be generated.
        #[serde(default)]
        add_generation_prompt: Option<bool>,
    },
    /// Plain text, no template.
    Text {
        /// The prompt.
        text: String,
    },
    /// Token ids, taken as they are.
    Tokens {
        /// The prompt.
        ids: Vec<u32>,
    },
}

/// Which chunks of a stream have the usage (`OpenAI` routes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsageChunks {
    /// None.
    #[default]
    None,
    /// One more before `[DONE]`.
    Last,
    /// One more before `[DONE]`, and each of the others has the usage so far.
    Every,
}

/// What becomes of a turn whose client leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDisconnect {
    /// The session stays at its last committed turn.
    #[default]
    Rollback,
    /// The turn is committed with what was generated so far.
    Keep,
}

/// What to do when history + input + requested output exceed the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnOverflow {
    /// Refuse with 400 `context_length_exceeded`.
    #[default]
    Error,
    /// Generate only what fits.
    TruncateOutput,
    /// Drop the oldest turns after the system prompt.
    DropOldestTurns,
    /// Drop the oldest turns until the input fits, and generate only what fits then.
    DropOldestThenTruncate,
}

impl OnOverflow {
    /// Whether turns may be dropped.
    pub const fn drops_turns(self) -> bool {
        matches!(self, Self::DropOldestTurns | Self::DropOldestThenTruncate)
    }

    /// Whether output may be cut to what fits.
    pub const fn truncates(self) -> bool {
        matches!(self, Self::TruncateOutput | Self::DropOldestThenTruncate)
    }
}

/// What becomes of a session's KV after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Retention {
    /// It, and the session, are kept for so long, where others can make room.
    Hold {
        /// Milliseconds.
        ms: u64,
    },
    /// It is given up at once; the session's tokens stay.
    GiveUp,
}

/// Where token ids are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenIds {
    /// Those of prompt and answer beside the text.
    pub beside_text: bool,
    /// In the place of the tokens' texts, in log-probabilities.
    pub as_tokens: bool,
}

/// The session a turn belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a member of its JSON"
)]
#[serde(deny_unknown_fields)]
pub struct SessionRef {
    /// The client's id, unique within its tenant.
    pub id: SessionId,
    /// First turn: a live session of this id is dropped and a new one starts.
    #[serde(default)]
    pub start: bool,
    /// The client has not said so: where `start` drops a live session, the reply has a warning (/generate).
    #[serde(default)]
    pub by_default: bool,
    /// Create the session if it does not live; else continue it (chat completions).
    #[serde(default)]
    pub create: bool,
    /// A session that this one begins as a branch of: where that stands, without any of its memory of randomness.
    #[serde(default)]
    pub parent: Option<SessionId>,
    /// Run this turn, then drop the session.
    #[serde(default)]
    pub end: bool,
    /// What becomes of the session's KV after the turn; absent: it is evicted in its time.
    #[serde(default)]
    pub retention: Option<Retention>,
    /// What becomes of the turn if the client leaves.
    #[serde(default)]
    pub on_disconnect: OnDisconnect,
}

/// How a token is chosen from the logits.
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
    /// (token id, added to its logit in [-100, 100]).
    pub logit_bias: Vec<(u32, f32)>,
    /// Seeds sampling as a function of (seed, position); absent: random.
    pub seed: Option<u64>,
    /// Alternatives to report for each token; absent: none, 0: the chosen token's own.
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
    /// Most tokens to generate; absent: what the context holds. 0: prefill only.
    pub max_tokens: Option<u32>,
    /// Most tokens where `max_tokens` is absent and the context holds as many.
    pub default_max_tokens: Option<u32>,
    /// End tokens and stop tokens are held off until then.
    pub min_tokens: u32,
    /// Strings that end the text; they are not part of it unless `include_stop`.
    pub stop: Vec<String>,
    /// Tokens that end the text, beside the model's own.
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

/// One request, validated.
#[allow(
    clippy::struct_excessive_bools,
    reason = "a request's switches, each by its own name in JSON"
)]
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Submission {
    /// Whose wire form the reply has: a name of `crate::wire`.
    pub route: String,
    /// The reply's `id` (OpenAI routes).
    #[serde(default)]
    pub reply_id: String,
    /// The reply's `model`.
    #[serde(default)]
    pub model: String,
    /// The reply's `created`, in seconds since 1970.
    #[serde(default)]
    pub created: i64,
    /// Further members of the reply's object: what was asked for (`/v1/responses`), or the server's fingerprint (OpenAI's
    /// older routes).
    #[serde(default)]
    pub envelope: Map<String, Value>,
    /// Stream, or answer whole.
    #[serde(default)]
    pub stream: bool,
    /// Which chunks of a stream have the usage.
    #[serde(default)]
    pub usage_chunks: UsageChunks,
    /// Number of the first choice in the reply, for one that is a part of a larger reply.
    #[serde(default)]
    pub first_choice: u32,
    /// The prompt before the text, and its log-probabilities before those of the output.
    #[serde(default)]
    pub echo: bool,
    /// Alternatives to report for each token of the prompt, beside its own; absent: none, and not its own.
    #[serde(default)]
    pub prompt_logprobs: Option<u32>,
    /// Where token ids are told (chat and text completions).
    #[serde(default)]
    pub token_ids: TokenIds,
    /// What goes to the model.
    pub input: Input,
    /// Absent: an anonymous session that ends with its turn.
    #[serde(default)]
    pub session: Option<SessionRef>,
    /// The conversation that `messages` may go on with, as its client names it. Never more than a hint.
    #[serde(default)]
    pub lane: Option<String>,
    /// What to do when the request does not fit into the context.
    #[serde(default)]
    pub on_overflow: OnOverflow,
    /// How tokens are chosen.
    #[serde(default)]
    pub sampling: SamplingParams,
    /// When generation ends.
    #[serde(default)]
    pub stopping: StopParams,
    /// What the text must be; absent: anything.
    #[serde(default)]
    pub guide: Option<Guide>,
    /// The client's field that `guide` comes from, for messages.
    #[serde(default = "guide_param")]
    pub guide_param: String,
    /// White space between the tokens of JSON that `guide` asks for.
    #[serde(default)]
    pub guided_whitespace: Whitespace,
    /// Whether the answer calls functions; absent: it does not, and nothing in it is taken for a call.
    #[serde(default)]
    pub tool_choice: Option<ToolChoice>,
    /// An answer may have more than one call.
    #[serde(default = "yes")]
    pub parallel_tool_calls: bool,
    /// How calls of some functions are told, by the names that the model sees (`/v1/responses`).
    #[serde(default)]
    pub call_forms: HashMap<String, CallForm>,
    /// In which member of a chat completion calls are told.
    #[serde(default)]
    pub call_member: CallMember,
    /// Most tokens of thoughts, after which their end is forced; absent: no limit.
    #[serde(default)]
    pub thinking_budget: Option<u32>,
    /// Independent answers to the one prompt.
    #[serde(default = "one")]
    pub n: u32,
    /// The API key's number; tenants share no session and no cache entry. 0: no key.
    #[serde(default)]
    pub tenant: u32,
    /// Smaller runs first.
    #[serde(default)]
    pub priority: i32,
    /// The server asks on the tenant's behalf: it takes nothing of what the tenant may have in flight.
    #[serde(default)]
    pub background: bool,
}

const fn yes() -> bool {
    true
}

fn guide_param() -> String {
    "guide".to_owned()
}

const fn one() -> u32 {
    1
}

fn check_range(param: &str, value: f32, low: f32, high: f32) -> Result<()> {
    if value.is_finite() && (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(
        param,
        format!("{param} must lie in [{low}, {high}], but {value} was given"),
    ))
}

fn check_count(param: &str, value: usize, limit: usize) -> Result<()> {
    if value <= limit {
        return Ok(());
    }
    Err(Error::invalid(
        param,
        format!("{param} has {value} entries; the limit is {limit}"),
    ))
}

impl Submission {
    /// Alternatives to compute for each token of the prompt; absent: its log-probabilities are not asked for.
    pub fn scored_alternatives(&self) -> Option<u32> {
        let echoed = self.sampling.logprobs.filter(|_| self.echo);
        self.prompt_logprobs.max(echoed)
    }

    /// Parses and bounds one JSON object.
    ///
    /// # Errors
    /// `invalid_value` (400) names the field, its limit and what was given.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let submission: Self = serde_json::from_slice(json)
            .map_err(|e| Error::invalid("submission", format!("malformed request: {e}")))?;
        submission.check()?;
        Ok(submission)
    }

    fn check(&self) -> Result<()> {
        let s = &self.sampling;
        check_range("temperature", s.temperature, 0.0, 2.0)?;
        check_range("top_p", s.top_p, 0.0, 1.0)?;
        check_range("min_p", s.min_p, 0.0, 1.0)?;
        check_range("repetition_penalty", s.repetition_penalty, 0.01, 10.0)?;
        check_range("presence_penalty", s.presence_penalty, -2.0, 2.0)?;
        check_range("frequency_penalty", s.frequency_penalty, -2.0, 2.0)?;
        check_count("logit_bias", s.logit_bias.len(), MAX_LOGIT_BIAS)?;
        for &(_, bias) in &s.logit_bias {
            check_range("logit_bias", bias, -100.0, 100.0)?;
        }
        for (param, given) in [
            ("logprobs", s.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ] {
            if let Some(k) = given
                && k > MAX_LOGPROBS
            {
                return Err(Error::invalid(
                    param,
                    format!("{param} is at most {MAX_LOGPROBS}, but {k} was given"),
                ));
            }
        }
        check_count("stop", self.stopping.stop.len(), MAX_STOPS)?;
        check_count(
            "stop_token_ids",
            self.stopping.stop_token_ids.len(),
            MAX_STOPS,
        )?;
        for stop in &self.stopping.stop {
            if stop.is_empty() || stop.len() > MAX_STOP_BYTES {
                let given = stop.len();
                let message = format!(
                    "a stop string has 1 to {MAX_STOP_BYTES} bytes, but {given} were given"
                );
                return Err(Error::invalid("stop", message));
            }
        }
        if let Some(lane) = &self.lane
            && !(1..=MAX_LANE_BYTES).contains(&lane.len())
        {
            let message = format!(
                "a lane's name has 1 to {MAX_LANE_BYTES} bytes, but {} were given",
                lane.len()
            );
            return Err(Error::invalid("lane", message));
        }
        if let Some(guide) = &self.guide {
            guide.check(&self.guide_param)?;
        }
        tools::check_tools(self)?;
        if self.n == 0 || self.n > MAX_CHOICES {
            return Err(Error::invalid(
                "n",
                format!("n must lie in [1, {MAX_CHOICES}], but {} was given", self.n),
            ));
        }
        if self.n > 1 && self.session.is_some() {
            return Err(Error::invalid(
                "n",
                "a session's turn has one answer: n must be 1",
            ));
        }
        if self.prompt_logprobs.is_some() && self.session.is_some() {
            return Err(Error::invalid(
                "prompt_logprobs",
                "prompt_logprobs would compute the session's history again; ask for it without a session",
            ));
        }
        if self.echo && !matches!(self.input, Input::Text { .. } | Input::Tokens { .. }) {
            return Err(Error::invalid(
                "echo",
                "only a prompt of text or token ids is echoed",
            ));
        }
        Ok(())
    }
}
