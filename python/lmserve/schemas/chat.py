"""`POST /v1/chat/completions`: OpenAI's chat completions, and LMDeploy's additions to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import ANONYMOUS, MAX_MESSAGES, MAX_TOKENS, RequestedModel, Role, SessionId, Tag, Text
from lmserve.schemas.completion_sampling import CompletionSampling
from lmserve.schemas.hints import NoEffect, Unsupported
from lmserve.schemas.retention import Retention
from lmserve.schemas.sampling import OutputLimit, ThinkingBudget
from lmserve.schemas.thinking import EFFORT, Effort, Reasoning, ThinkingSwitch
from lmserve.schemas.tools import (
    MAX_CALLS,
    MAX_TOOLS,
    CalledFunction,
    CustomToolCall,
    FunctionDefinition,
    FunctionDelta,
    NamedFunction,
    ReplayedCall,
    ReplayedFunction,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
)


class ContentPart(Struct, frozen=True):
    """A part of a message's content. The models are text-only: images and files are errors. Other keys are ignored."""

    type: Annotated[
        Tag,
        Meta(
            examples=["text"],
            description="text, input_text or output_text; for an assistant, also refusal. In a tool's output, a part "
            "of any other type is left out, and the text says so.",
        ),
    ]
    text: Text | None = None
    refusal: Text | None = None


class ChatMessage(Struct, frozen=True, kw_only=True):
    """One message. A client may send an assistant's message back as it was received. Other keys are ignored."""

    role: Annotated[Role | Literal["tool", "function"], Meta(description="function is the older name of tool.")]
    content: Annotated[
        Text | Annotated[list[ContentPart], Meta(max_length=1024)] | None, Meta(description="Null: no content.")
    ] = None
    name: Annotated[
        Tag | None,
        Meta(
            description="The participant's name, for templates that read it. In a message of role function, the "
            "function's name."
        ),
    ] = None
    reasoning_content: Annotated[
        Text | None, Meta(description="The assistant's thoughts, for templates that read them.")
    ] = None
    reasoning: Annotated[Text | None, Meta(description="Another name of reasoning_content.")] = None
    refusal: Annotated[Text | None, Meta(description="The assistant's refusal, if there is no content.")] = None
    function_call: Annotated[ReplayedFunction | None, Meta(description="The older form of tool_calls.")] = None
    tool_calls: Annotated[
        Annotated[list[ReplayedCall], Meta(max_length=MAX_CALLS)] | None, Meta(description="The assistant's calls.")
    ] = None
    tool_call_id: Annotated[Tag | None, Meta(description="The id of the call that a tool's message answers.")] = None


class TemplateVariables(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Variables for the chat template. A template ignores those that it does not know."""

    enable_thinking: Annotated[bool | UnsetType, Meta(description="Read by the templates of Qwen3 and GLM 4.5.")] = (
        UNSET
    )
    thinking: Annotated[
        bool | UnsetType, Meta(description="Read by the templates of DeepSeek V3.1 and Granite 3.2.")
    ] = UNSET
    thinking_budget: Annotated[
        Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | UnsetType, Meta(description="Read by the templates of Seed-OSS.")
    ] = UNSET
    reasoning_effort: Annotated[Tag | UnsetType, Meta(description="Read by the templates of gpt-oss.")] = UNSET
    model_identity: Annotated[Tag | UnsetType, Meta(description="Read by the templates of gpt-oss.")] = UNSET
    date_string: Annotated[Tag | UnsetType, Meta(description="Today's date. Read by the templates of Llama 3.")] = UNSET


class ChatRequest(CompletionSampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chat completion. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    messages: Annotated[
        Text | Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)],
        Meta(
            description="The conversation; in a session, only the new messages. A string is one user message.",
            examples=[[{"role": "user", "content": "Hello!"}]],
        ),
    ]
    max_completion_tokens: Annotated[
        OutputLimit,
        Meta(
            description="Maximum number of tokens to generate. Null, -1, or a number that is too large: as many as fit "
            "into the context."
        ),
    ] = None
    max_tokens: Annotated[OutputLimit, Meta(description="The older name of max_completion_tokens.")] = None
    logprobs: Annotated[bool | None, Meta(description="Report the log-probability of each token.")] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(description="Report this many alternatives to each token. Needs logprobs."),
    ] = None

    session_id: Annotated[
        SessionId | None,
        Meta(
            description="The id of a session, the same as instance_id of /generate; messages then holds only the new "
            "ones. -1 or null: no session."
        ),
    ] = ANONYMOUS
    renew_session: Annotated[bool | None, Meta(description="Drop the session before this turn.")] = None
    add_generation_prompt: Annotated[
        bool | None,
        Meta(
            description="Whether the template opens the assistant's answer. Null: yes, unless a message is continued."
        ),
    ] = None
    continue_final_message: Annotated[
        bool | None,
        Meta(description="Continue the last message, which must be the assistant's, instead of answering it."),
    ] = None
    chat_template_kwargs: Annotated[TemplateVariables | None, Meta(description="Variables for the chat template.")] = (
        None
    )
    on_disconnect: Annotated[
        Literal["rollback", "keep"] | None, Meta(description="As in /generate. Only for turns of a session.")
    ] = None
    on_overflow: Annotated[
        Literal["error", "truncate_output", "drop_oldest_turns"] | None,
        Meta(description="As in /generate. Null: error in a session, truncate_output without one."),
    ] = None

    reasoning_effort: Annotated[Effort | None, Meta(description=EFFORT)] = None
    thinking_budget: Annotated[
        ThinkingBudget | None,
        Meta(
            description="Maximum number of thinking tokens. The server then forces the end of the thoughts. Null: no "
            "limit."
        ),
    ] = None
    reasoning: Annotated[
        Reasoning | None, Meta(description="reasoning_effort and thinking_budget in OpenRouter's form.")
    ] = None
    enable_thinking: Annotated[
        bool | None, Meta(description="Whether the model thinks, for templates with a switch.")
    ] = None
    thinking: Annotated[
        ThinkingSwitch | None,
        Meta(description="Whether the model thinks, and for how many tokens, as in /v1/messages."),
    ] = None

    tools: Annotated[
        Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None,
        Meta(description="Functions that the model may call. Tools that the server would have to run are ignored."),
    ] = None
    tool_choice: Annotated[
        ToolChoice | None,
        Meta(description="none, auto, required, one function, or allowed_tools. Null: auto if there are tools."),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="false: an answer has at most one call. Null: true.")
    ] = None
    functions: Annotated[
        Annotated[list[FunctionDefinition], Meta(max_length=MAX_TOOLS)] | None,
        Meta(description="The older form of tools. The answer then has a function_call instead of tool_calls."),
    ] = None
    function_call: Annotated[
        Literal["none", "auto"] | NamedFunction | None, Meta(description="The older form of tool_choice.")
    ] = None

    retention: Annotated[
        Retention | None,
        Meta(description="How long the session's KV cache will be needed after this turn. Null: unknown."),
    ] = None
    prompt_cache_key: Annotated[
        Tag | None,
        Meta(
            description="Names the conversation that the messages may continue, if no agent's header names one. See "
            "Lanes in docs/sessions.md."
        ),
    ] = None

    audio: Unsupported = UNSET
    kwargs: Unsupported = UNSET
    modalities: Unsupported = UNSET
    moderation: Unsupported = UNSET

    metadata: NoEffect = UNSET
    prediction: NoEffect = UNSET
    prompt_cache_options: NoEffect = UNSET
    prompt_cache_retention: NoEffect = UNSET
    provider: NoEffect = UNSET
    reasoning_summary: NoEffect = UNSET
    safety_identifier: NoEffect = UNSET
    service_tier: NoEffect = UNSET
    store: NoEffect = UNSET
    usage: NoEffect = UNSET
    user: NoEffect = UNSET
    verbosity: NoEffect = UNSET
    web_search_options: NoEffect = UNSET


class PromptTokensDetails(Struct, frozen=True):
    """Details of the prompt's tokens."""

    cached_tokens: Annotated[int, Meta(description="Tokens that came from the KV cache.")]


class CompletionTokensDetails(Struct, frozen=True):
    """Details of the generated tokens."""

    reasoning_tokens: Annotated[int, Meta(description="Tokens of thoughts, including their markers.")]


class ChatUsage(Struct, frozen=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Annotated[
        PromptTokensDetails | UnsetType, Meta(description="Absent while the answer is still being generated.")
    ] = UNSET
    completion_tokens_details: Annotated[
        CompletionTokensDetails | UnsetType, Meta(description="Present in chats with a model that thinks.")
    ] = UNSET


class PromptLogprob(Struct, frozen=True):
    """A prompt token, or an alternative to it."""

    logprob: float
    rank: Annotated[
        int | None, Meta(description="Rank, counted from 1. Null for a token that is not among the alternatives.")
    ]
    decoded_token: str


PromptLogprobs = Annotated[
    list[dict[str, PromptLogprob] | None],
    Meta(description="For each prompt token, the token and its alternatives by token id. Null for the first one."),
]


class TopLogprob(Struct, frozen=True):
    """An alternative token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct, frozen=True):
    """A token of the reply, its natural log-probability and its most likely alternatives."""

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
    reasoning_content: Annotated[str | UnsetType, Meta(description="What the model thought before it answered.")] = (
        UNSET
    )
    tool_calls: list[ToolCall | CustomToolCall] | UnsetType = UNSET
    function_call: Annotated[
        CalledFunction | UnsetType, Meta(description="Takes the place of tool_calls if the request had functions.")
    ] = UNSET
    refusal: str | None = None


FinishReason = Annotated[Literal["stop", "length"], Meta(description="A cancelled turn ends with stop.")]
ChatFinishReason = Annotated[
    Literal["stop", "length", "tool_calls", "function_call"], Meta(description="A cancelled turn ends with stop.")
]


TokenIdList = Annotated[list[int] | UnsetType, Meta(description="Present if return_token_ids is true.")]


class ChatChoice(Struct, frozen=True):
    """One answer."""

    index: int
    message: AssistantMessage
    finish_reason: ChatFinishReason
    logprobs: ChoiceLogprobs | None = None
    token_ids: TokenIdList = UNSET


SystemFingerprint = Annotated[
    str | UnsetType,
    Meta(description="Identifies version, model and template. While it stays the same, equal seeds give equal texts."),
]


class ChatReply(Struct, frozen=True, kw_only=True):
    """A chat completion; `created` is in seconds since 1970."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: SystemFingerprint = UNSET
    choices: list[ChatChoice]
    prompt_token_ids: TokenIdList = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    usage: ChatUsage


class ChatDelta(Struct, frozen=True):
    """The new part of an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    function_call: FunctionDelta | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    """The new part of one answer of a streamed completion."""

    index: int
    delta: ChatDelta
    finish_reason: ChatFinishReason | None = None
    logprobs: ChoiceLogprobs | None = None
    token_ids: TokenIdList = UNSET


class ChatChunk(Struct, frozen=True, kw_only=True):
    """The `data` of one server-sent event. The last event's `data` is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: SystemFingerprint = UNSET
    choices: list[ChunkChoice]
    prompt_token_ids: TokenIdList = UNSET
    usage: ChatUsage | UnsetType | None = UNSET
