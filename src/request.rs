//! A request as it enters the core: one JSON object ([`Submission`]). All limits are checked here, once: after
//! [`Submission::parse`] only valid requests exist, whatever their route.

mod guide;
mod params;
mod session;
mod session_id;
mod tools;
mod turn_key;
mod types;

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
pub use guide::{Guide, MAX_GUIDE_BYTES, MAX_GUIDE_CHOICES, Whitespace, check_bytes};
pub use params::{SamplingParams, StopParams};
pub use session::{OnDisconnect, Retention, SessionRef};
pub use session_id::{MAX_NAME_CHARS, SessionId};
pub use tools::{CallForm, CallMember, MAX_TOOLS, ToolChoice, functions};
pub use turn_key::TurnKey;
pub use types::{Function, Types, types_of};

/// Maximum number of stop strings of one request.
pub const MAX_STOPS: usize = 64;
/// Maximum length of a stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;
/// Maximum length of a lane's name, in bytes.
pub const MAX_LANE_BYTES: usize = 256;
/// Maximum number of entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Maximum number of alternatives reported for a token.
pub const MAX_LOGPROBS: u32 = 20;
/// Maximum number of choices of one request.
pub const MAX_CHOICES: u32 = 64;

/// The input of the model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Input {
    /// One user turn, rendered with the chat template.
    Turn {
        /// The user's text.
        text: String,
    },
    /// Messages, rendered with the chat template: a whole conversation, or only the new ones in a continued session.
    Messages {
        /// `{role, content, ...}` objects.
        messages: Vec<Value>,
        /// Tool descriptions, for templates that support tools.
        #[serde(default)]
        tools: Option<Vec<Value>>,
        /// Extra variables for the template.
        #[serde(default)]
        template_kwargs: Map<String, Value>,
        /// Leaves the last assistant message open, so that it is continued.
        #[serde(default)]
        continue_final_message: bool,
        /// Whether the template opens the assistant's answer. Absent: yes, unless nothing is generated.
        #[serde(default)]
        add_generation_prompt: Option<bool>,
    },
    /// Plain text, without a template.
    Text {
        /// The prompt.
        text: String,
    },
    /// Token ids, used as they are.
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
    /// An additional chunk before `[DONE]`.
    Last,
    /// An additional chunk before `[DONE]`, and every other chunk has the usage so far.
    Every,
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

    /// Whether the output may be truncated to what fits.
    pub const fn truncates(self) -> bool {
        matches!(self, Self::TruncateOutput | Self::DropOldestThenTruncate)
    }
}

/// Where the reply has token ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenIds {
    /// Token ids of the prompt and the answer, in addition to the text.
    pub beside_text: bool,
    /// In log-probabilities, instead of the tokens' texts.
    pub as_tokens: bool,
}

/// One request, validated.
#[allow(
    clippy::struct_excessive_bools,
    reason = "a request's switches, each by its own name in JSON"
)]
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Submission {
    /// The wire format of the reply: a name of `crate::wire`.
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
    /// Further members of the reply's object: fields of the request (`/v1/responses`), or the server's fingerprint (OpenAI's
    /// older routes).
    #[serde(default)]
    pub envelope: Map<String, Value>,
    /// Whether the reply is streamed.
    #[serde(default)]
    pub stream: bool,
    /// Which chunks of a stream have the usage.
    #[serde(default)]
    pub usage_chunks: UsageChunks,
    /// Index of the first choice in the reply, if this request is a part of a larger reply.
    #[serde(default)]
    pub first_choice: u32,
    /// Put the prompt before the text, and its log-probabilities before those of the output.
    #[serde(default)]
    pub echo: bool,
    /// Number of alternatives to report for each prompt token, in addition to its own log-probability. Absent: report nothing.
    #[serde(default)]
    pub prompt_logprobs: Option<u32>,
    /// Where the reply has token ids (chat and text completions).
    #[serde(default)]
    pub token_ids: TokenIds,
    /// The input of the model.
    pub input: Input,
    /// Absent: an anonymous session that ends with its turn.
    #[serde(default)]
    pub session: Option<SessionRef>,
    /// Names the turn of its session. If the session has a turn of that name, the reply says its answer again, and nothing is
    /// committed.
    #[serde(default)]
    pub turn_key: Option<TurnKey>,
    /// The lane that `messages` may continue, as its client names it. It is only a hint.
    #[serde(default)]
    pub lane: Option<String>,
    /// What to do when the request does not fit into the context.
    #[serde(default)]
    pub on_overflow: OnOverflow,
    /// How tokens are sampled.
    #[serde(default)]
    pub sampling: SamplingParams,
    /// When generation ends.
    #[serde(default)]
    pub stopping: StopParams,
    /// The constraint on the text. Absent: none.
    #[serde(default)]
    pub guide: Option<Guide>,
    /// The client's field from which `guide` comes, for error messages.
    #[serde(default = "guide_param")]
    pub guide_param: String,
    /// White space between the tokens of JSON that `guide` asks for.
    #[serde(default)]
    pub guided_whitespace: Whitespace,
    /// Whether the answer may call functions. Absent: it may not, and no text is parsed as a call.
    #[serde(default)]
    pub tool_choice: Option<ToolChoice>,
    /// An answer may have more than one call.
    #[serde(default = "yes")]
    pub parallel_tool_calls: bool,
    /// How the reply reports calls of some functions, by the names that the model sees (`/v1/responses`).
    #[serde(default)]
    pub call_forms: HashMap<String, CallForm>,
    /// The member of a chat completion that has the calls.
    #[serde(default)]
    pub call_member: CallMember,
    /// Maximum number of thinking tokens, after which the end of the thoughts is forced. Absent: no limit.
    #[serde(default)]
    pub thinking_budget: Option<u32>,
    /// Number of independent answers to the prompt.
    #[serde(default = "one")]
    pub n: u32,
    /// The API key's number; tenants share no session and no cache entry. 0: no key.
    #[serde(default)]
    pub tenant: u32,
    /// The number of the adapter that computes it; 0: none. Absent: that of its session's turns.
    #[serde(default)]
    pub adapter: Option<u32>,
    /// What tells that adapter's contents from another's, once it is known.
    #[serde(skip)]
    pub adapter_digest: Option<[u8; 32]>,
    /// Requests with a smaller number run first.
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
    /// Number of alternatives to compute for each prompt token. Absent: no log-probabilities are requested.
    pub fn scored_alternatives(&self) -> Option<u32> {
        let echoed = self.sampling.logprobs.filter(|_| self.echo);
        self.prompt_logprobs.max(echoed)
    }

    /// Parses one JSON object and checks its limits.
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
                    format!("{param} must be at most {MAX_LOGPROBS}, but {k} was given"),
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
                    "a stop string must have 1 to {MAX_STOP_BYTES} bytes, but {given} were given"
                );
                return Err(Error::invalid("stop", message));
            }
        }
        if let Some(lane) = &self.lane
            && !(1..=MAX_LANE_BYTES).contains(&lane.len())
        {
            let message = format!(
                "a lane's name must have 1 to {MAX_LANE_BYTES} bytes, but {} were given",
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
                "prompt_logprobs is not supported in a session: it would compute the history again; send the \
                 request without a session",
            ));
        }
        if self.echo && !matches!(self.input, Input::Text { .. } | Input::Tokens { .. }) {
            return Err(Error::invalid(
                "echo",
                "only a prompt of text or token ids can be echoed",
            ));
        }
        Ok(())
    }
}
