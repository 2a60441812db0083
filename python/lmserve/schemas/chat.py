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
            description="text, input_text, output_text; an assistant's refusal. In what a tool gave, any other is left "
            "out, and the text says so.",
        ),
    ]
    text: Text | None = None
    refusal: Text | None = None


class ChatMessage(Struct, frozen=True, kw_only=True):
    """One message. An assistant's message may be sent back as it was received. Other keys are ignored."""

    role: Annotated[Role | Literal["tool", "function"], Meta(description="function: the older name of tool.")]
    content: Annotated[
        Text | Annotated[list[ContentPart], Meta(max_length=1024)] | None, Meta(description="Null: nothing.")
    ] = None
    name: Annotated[
        Tag | None, Meta(description="The participant's name, for templates that know it; of role function, its name.")
    ] = None
    reasoning_content: Annotated[Text | None, Meta(description="For templates that know it.")] = None
    reasoning: Annotated[Text | None, Meta(description="Another name of reasoning_content.")] = None
    refusal: Annotated[Text | None, Meta(description="The assistant's words, where there is no content.")] = None
    function_call: Annotated[ReplayedFunction | None, Meta(description="The older form of tool_calls.")] = None
    tool_calls: Annotated[
        Annotated[list[ReplayedCall], Meta(max_length=MAX_CALLS)] | None, Meta(description="Calls of an assistant.")
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


class ChatRequest(CompletionSampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chat completion. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    messages: Annotated[
        Text | Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)],
        Meta(
            description="The conversation, or what is new in a session; a string is one user message.",
            examples=[[{"role": "user", "content": "Hello!"}]],
        ),
    ]
    max_completion_tokens: Annotated[
        OutputLimit, Meta(description="Most tokens to generate; null, -1, or too many: what the context has left.")
    ] = None
    max_tokens: Annotated[OutputLimit, Meta(description="The older name of max_completion_tokens.")] = None
    logprobs: Annotated[bool | None, Meta(description="Report the log-probability of each token.")] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None, Meta(description="And of so many alternatives; needs logprobs.")
    ] = None

    session_id: Annotated[
        SessionId | None,
        Meta(description="A session, as instance_id of /generate; messages are what is new. -1 or null: none."),
    ] = ANONYMOUS
    renew_session: Annotated[bool | None, Meta(description="Drop the session first.")] = None
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
        Literal["error", "truncate_output", "drop_oldest_turns"] | None,
        Meta(description="As in /generate. Null: without a session, as truncate_output; in one, as error."),
    ] = None

    reasoning_effort: Annotated[Effort | None, Meta(description=EFFORT)] = None
    thinking_budget: Annotated[
        ThinkingBudget | None, Meta(description="Most tokens of thoughts; then their end is forced. Null: no limit.")
    ] = None
    reasoning: Annotated[
        Reasoning | None, Meta(description="reasoning_effort and thinking_budget as OpenRouter has them.")
    ] = None
    enable_thinking: Annotated[bool | None, Meta(description="Whether to think, for templates with a switch.")] = None
    thinking: Annotated[
        ThinkingSwitch | None, Meta(description="Whether to think, and for how many tokens, as in /v1/messages.")
    ] = None

    tools: Annotated[
        Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None,
        Meta(description="Functions that may be called. Tools that the server would have to run are left out."),
    ] = None
    tool_choice: Annotated[
        ToolChoice | None,
        Meta(description="none, auto, required, one function, or allowed_tools; null: auto, where there are tools."),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="false: an answer calls once at most; null: true.")
    ] = None
    functions: Annotated[
        Annotated[list[FunctionDefinition], Meta(max_length=MAX_TOOLS)] | None,
        Meta(description="The older form of tools. The answer has a function_call then."),
    ] = None
    function_call: Annotated[
        Literal["none", "auto"] | NamedFunction | None, Meta(description="The older form of tool_choice.")
    ] = None

    retention: Annotated[
        Retention | None, Meta(description="How long the session's KV will be needed after the turn; null: not said.")
    ] = None
    prompt_cache_key: Annotated[
        Tag | None,
        Meta(
            description="Names the conversation that messages may go on with, where no header of an agent does; "
            "see docs/sessions.md, Lanes."
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
    tool_calls: list[ToolCall | CustomToolCall] | UnsetType = UNSET
    function_call: Annotated[
        CalledFunction | UnsetType, Meta(description="In the place of tool_calls, where functions were given.")
    ] = UNSET
    refusal: str | None = None


FinishReason = Annotated[Literal["stop", "length"], Meta(description="A cancelled turn stopped.")]
ChatFinishReason = Annotated[
    Literal["stop", "length", "tool_calls", "function_call"], Meta(description="A cancelled turn stopped.")
]


TokenIdList = Annotated[list[int] | UnsetType, Meta(description="Where return_token_ids is true.")]


class ChatChoice(Struct, frozen=True):
    """One answer."""

    index: int
    message: AssistantMessage
    finish_reason: ChatFinishReason
    logprobs: ChoiceLogprobs | None = None
    token_ids: TokenIdList = UNSET


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
    prompt_token_ids: TokenIdList = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    usage: ChatUsage


class ChatDelta(Struct, frozen=True):
    """What is new in an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    function_call: FunctionDelta | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    """What is new in one answer of a streamed completion."""

    index: int
    delta: ChatDelta
    finish_reason: ChatFinishReason | None = None
    logprobs: ChoiceLogprobs | None = None
    token_ids: TokenIdList = UNSET


class ChatChunk(Struct, frozen=True, kw_only=True):
    """The `data` of one server-sent event; the last event's is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: SystemFingerprint = UNSET
    choices: list[ChunkChoice]
    prompt_token_ids: TokenIdList = UNSET
    usage: ChatUsage | UnsetType | None = UNSET
