"""`POST /v1/chat/completions`: OpenAI's chat completions, and LMDeploy's additions to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from lmserve.schemas.bounds import (
    ANONYMOUS,
    MAX_MESSAGES,
    MAX_TOKENS,
    LogitBias,
    MinP,
    MinTokens,
    Penalty,
    Priority,
    RepetitionPenalty,
    RequestedModel,
    Role,
    Seed,
    SessionId,
    StopStrings,
    StopTokenIds,
    Tag,
    Temperature,
    Text,
    TopK,
    TopP,
)
from lmserve.schemas.guided import GuidedRequest
from lmserve.schemas.tools import MAX_CALLS, MAX_TOOLS, Tool, ToolCall, ToolCallDelta, ToolChoice

Unsupported = Annotated[Raw | UnsetType, Meta(description="Not supported: a 400, unless null or without effect.")]
NoEffect = Annotated[Raw | UnsetType, Meta(description="Taken, and of no effect.")]
OptionalTokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None


class ContentPart(Struct, frozen=True):
    """A part of a message's content. The models are text-only: any other type is an error."""

    type: Annotated[Tag, Meta(examples=["text"])]
    text: Text | None = None


class ChatMessage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message. An assistant's message may be sent back as it was received."""

    role: Role | Literal["tool"]
    content: Annotated[
        Text | Annotated[list[ContentPart], Meta(max_length=1024)] | None,
        Meta(description="Null only in an assistant's message with tool_calls."),
    ] = None
    name: Annotated[Tag | None, Meta(description="The participant's name, for templates that know it.")] = None
    reasoning_content: Annotated[Text | None, Meta(description="For templates that know it.")] = None
    refusal: Unsupported = UNSET
    annotations: Unsupported = UNSET
    audio: Unsupported = UNSET
    function_call: Unsupported = UNSET
    tool_calls: Annotated[
        Annotated[list[ToolCall], Meta(max_length=MAX_CALLS)] | None, Meta(description="Calls of an assistant.")
    ] = None
    tool_call_id: Annotated[Tag | None, Meta(description="The call that a tool's message answers.")] = None


class TemplateVariables(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Variables that chat templates read beside the messages. A template ignores those it does not know."""

    enable_thinking: Annotated[bool | UnsetType, Meta(description="Qwen3, GLM 4.5.")] = UNSET
    thinking: Annotated[bool | UnsetType, Meta(description="DeepSeek V3.1, Granite 3.2.")] = UNSET
    thinking_budget: Annotated[
        Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | UnsetType, Meta(description="Seed-OSS.")
    ] = UNSET
    reasoning_effort: Annotated[Tag | UnsetType, Meta(description="gpt-oss.")] = UNSET
    model_identity: Annotated[Tag | UnsetType, Meta(description="gpt-oss.")] = UNSET
    date_string: Annotated[Tag | UnsetType, Meta(description="Llama 3: today's date.")] = UNSET


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a streamed reply."""

    include_usage: Annotated[bool | None, Meta(description="A chunk with the usage before the end.")] = None
    continuous_usage_stats: Annotated[
        bool | None, Meta(description="The usage so far in every chunk; needs include_usage.")
    ] = None
    include_obfuscation: Annotated[bool | None, Meta(description="Taken, and of no effect.")] = None


class ChatRequest(GuidedRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chat completion. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    messages: Annotated[
        Text | Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)],
        Meta(
            description="The conversation, or what is new in a session; a string is one user message.",
            examples=[[{"role": "user", "content": "Hello!"}]],
        ),
    ]
    stream: Annotated[bool | None, Meta(description="Reply in server-sent events.")] = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: Annotated[
        OptionalTokens, Meta(description="Most tokens to generate; null: what the context holds.")
    ] = None
    max_tokens: Annotated[OptionalTokens, Meta(description="The older name of max_completion_tokens.")] = None
    temperature: Annotated[Temperature | None, Meta(description="0 is greedy; null: the model's own, or 1.")] = None
    top_p: Annotated[
        TopP | None, Meta(description="Only the likeliest tokens that add up to this; null: the model's own, or 1.")
    ] = None
    n: Annotated[Annotated[int, Meta(ge=1, le=64)] | None, Meta(description="Independent answers; null: 1.")] = None
    stop: Annotated[StopStrings | None, Meta(description="Strings that end the text and are not part of it.")] = None
    seed: Annotated[Seed | None, Meta(description="The same seed gives the same tokens; null: random.")] = None
    presence_penalty: Annotated[Penalty | None, Meta(description="Off logits of tokens in the output; null: 0.")] = None
    frequency_penalty: Annotated[Penalty | None, Meta(description="The same, once per occurrence; null: 0.")] = None
    logit_bias: Annotated[LogitBias | None, Meta(description="Token id: what is added to its logit.")] = None
    logprobs: Annotated[bool | None, Meta(description="Report the log-probability of each token.")] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None, Meta(description="And of so many alternatives; needs logprobs.")
    ] = None

    prompt_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(description="Report the log-probability of each token of the prompt, and of so many alternatives."),
    ] = None
    session_id: Annotated[
        SessionId | None,
        Meta(description="A session, as instance_id of /generate; messages are what is new. -1 or null: none."),
    ] = ANONYMOUS
    renew_session: Annotated[bool | None, Meta(description="Drop the session first.")] = None
    top_k: Annotated[
        TopK | None, Meta(description="Only the k likeliest tokens; 0 or -1: all; null: the model's own, or all.")
    ] = None
    min_p: Annotated[MinP | None, Meta(description="Only tokens this likely, relative to the likeliest.")] = None
    repetition_penalty: Annotated[
        RepetitionPenalty | None,
        Meta(description="Makes tokens of prompt and output less likely; null: the model's own, or 1, off."),
    ] = None
    ignore_eos: Annotated[bool | None, Meta(description="Never stop at an end token.")] = None
    min_tokens: Annotated[MinTokens | None, Meta(description="No end or stop token before so many; null: 0.")] = None
    stop_token_ids: Annotated[
        StopTokenIds | None, Meta(description="Tokens that end the text, beside the model's own.")
    ] = None
    include_stop_str_in_output: Annotated[bool | None, Meta(description="Keep the stop string in the text.")] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="Leave special tokens out of the text; null: true.")
    ] = None
    priority: Annotated[Priority | None, Meta(description="Smaller runs first; null: 0.")] = None
    add_generation_prompt: Annotated[
        bool | None,
        Meta(description="Whether the template opens the answer; null: yes, unless a message is continued."),
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="Continue the last message, the assistant's, instead of answering it.")
    ] = None
    chat_template_kwargs: Annotated[TemplateVariables | None, Meta(description="Variables for the chat template.")] = (
        None
    )
    on_disconnect: Annotated[
        Literal["rollback", "keep"] | None, Meta(description="As in /generate; for turns of a session.")
    ] = None
    on_overflow: Annotated[
        Literal["error", "truncate_output", "drop_oldest_turns"] | None, Meta(description="As in /generate.")
    ] = None

    tools: Annotated[
        Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None, Meta(description="Functions that may be called.")
    ] = None
    tool_choice: Annotated[
        ToolChoice | None, Meta(description="none, auto, required, or one function; null: auto, where there are tools.")
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="false: an answer calls once at most; null: true.")
    ] = None

    audio: Unsupported = UNSET
    function_call: Unsupported = UNSET
    functions: Unsupported = UNSET
    kwargs: Unsupported = UNSET
    modalities: Unsupported = UNSET
    moderation: Unsupported = UNSET
    reasoning_effort: Unsupported = UNSET
    verbosity: Unsupported = UNSET
    web_search_options: Unsupported = UNSET

    metadata: NoEffect = UNSET
    prediction: NoEffect = UNSET
    prompt_cache_key: NoEffect = UNSET
    prompt_cache_options: NoEffect = UNSET
    prompt_cache_retention: NoEffect = UNSET
    safety_identifier: NoEffect = UNSET
    service_tier: NoEffect = UNSET
    store: NoEffect = UNSET
    user: NoEffect = UNSET


class PromptTokensDetails(Struct, frozen=True):
    """Of the prompt's tokens."""

    cached_tokens: Annotated[int, Meta(description="Not computed again.")]


class CompletionTokensDetails(Struct, frozen=True):
    """Of the generated tokens."""

    reasoning_tokens: Annotated[int, Meta(description="Thoughts, their markers included.")]


class ChatUsage(Struct, frozen=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Annotated[
        PromptTokensDetails | UnsetType, Meta(description="Not in a usage that is still growing.")
    ] = UNSET
    completion_tokens_details: Annotated[
        CompletionTokensDetails | UnsetType, Meta(description="In chats with a model that thinks.")
    ] = UNSET


class PromptLogprob(Struct, frozen=True):
    """A token of the prompt, or one that could have stood in its place."""

    logprob: float
    rank: Annotated[int | None, Meta(description="From 1; null for a token that is not among the alternatives.")]
    decoded_token: str


PromptLogprobs = Annotated[
    list[dict[str, PromptLogprob] | None],
    Meta(description="For each token of the prompt, itself and its alternatives by token id; null for the first."),
]


class TopLogprob(Struct, frozen=True):
    """An alternative token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct, frozen=True):
    """A token of the reply, its natural log-probability and its likeliest alternatives."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Struct, frozen=True):
    """Log-probabilities of a choice."""

    content: list[TokenLogprob] | None
    refusal: Any = None


class AssistantMessage(Struct, frozen=True):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: Annotated[str | UnsetType, Meta(description="What the model thought first.")] = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    refusal: str | None = None


FinishReason = Annotated[Literal["stop", "length"], Meta(description="A cancelled turn stopped.")]
ChatFinishReason = Annotated[Literal["stop", "length", "tool_calls"], Meta(description="A cancelled turn stopped.")]


class ChatChoice(Struct, frozen=True):
    """One answer."""

    index: int
    message: AssistantMessage
    finish_reason: ChatFinishReason
    logprobs: ChoiceLogprobs | None = None


SystemFingerprint = Annotated[
    str | UnsetType, Meta(description="Equal seeds give equal texts while it is the same: version, model and template.")
]


class ChatReply(Struct, frozen=True, kw_only=True):
    """A chat completion; `created` is in seconds since 1970."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: SystemFingerprint = UNSET
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    usage: ChatUsage


class ChatDelta(Struct, frozen=True):
    """What is new in an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    """What is new in one answer of a streamed completion."""

    index: int
    delta: ChatDelta
    finish_reason: ChatFinishReason | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatChunk(Struct, frozen=True, kw_only=True):
    """The `data` of one server-sent event; the last event's is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: SystemFingerprint = UNSET
    choices: list[ChunkChoice]
    usage: ChatUsage | UnsetType | None = UNSET
