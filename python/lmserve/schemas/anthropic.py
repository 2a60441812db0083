"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from lmserve.schemas.bounds import MAX_MESSAGES, MAX_TOKENS, RequestedModel, StopString, Tag, Text, TopK, TopP
from lmserve.schemas.guided import JsonSchema
from lmserve.schemas.hints import NoEffect, Unsupported
from lmserve.schemas.thinking import EFFORT, Effort, ThinkingSwitch
from lmserve.schemas.tools import MAX_TOOLS, Arguments, FunctionName

MAX_BLOCKS: Final = 1024
# Blocks that are left out: what a server's own tools asked, and thoughts that only their maker can read. What such
# tools gave is left out too: its types end alike.
LEFT_OUT: Final = ("redacted_thinking", "server_tool_use", "mcp_tool_use", "container_upload", "compaction", "fallback")


class TextPart(Struct, frozen=True):
    """A part of a text. The models are text-only: images and files are an error. Further keys are ignored."""

    type: Annotated[
        Tag,
        Meta(
            examples=["text"],
            description="text, tool_reference. In a tool's result, any other is left out, and the text says so.",
        ),
    ]
    text: Annotated[Text | None, Meta(description="Of text.")] = None
    tool_name: Annotated[FunctionName | None, Meta(description="Of tool_reference: the tool that was found.")] = None


Parts = Text | Annotated[list[TextPart], Meta(max_length=MAX_BLOCKS)]


class ContentBlock(Struct, frozen=True, kw_only=True):
    """A part of a message. The models are text-only: images and files are an error. Further keys are ignored."""

    type: Annotated[
        Tag,
        Meta(
            examples=["text"],
            description="text; the user's tool_result; the assistant's tool_use and thinking, as they were received. "
            "What a server's tools gave, and redacted_thinking, is left out.",
        ),
    ]
    text: Annotated[Text | None, Meta(description="Of text.")] = None
    thinking: Annotated[Text | None, Meta(description="Of thinking, for templates that know it.")] = None
    id: Annotated[Tag | None, Meta(description="Of tool_use.")] = None
    name: Annotated[FunctionName | None, Meta(description="Of tool_use.")] = None
    input: Annotated[Arguments | None, Meta(description="Of tool_use.")] = None
    tool_use_id: Annotated[Tag | None, Meta(description="Of tool_result: the call that it answers.")] = None
    content: Annotated[Parts | Arguments | None, Meta(description="Of tool_result; null: nothing.")] = None
    is_error: Annotated[bool | None, Meta(description='Of tool_result: "Error: " is put before it.')] = None


Content = Text | Annotated[list[ContentBlock], Meta(max_length=MAX_BLOCKS)]


class InputMessage(Struct, frozen=True):
    """One message. Those of one role that follow each other are one turn; an assistant's at the end is continued.

    Further keys are ignored.
    """

    role: Annotated[
        Literal["user", "assistant", "system"],
        Meta(description="system: a note on the way; a template without such notes shows it as the user's."),
    ]
    content: Content


Messages = Annotated[
    list[InputMessage],
    Meta(min_length=1, max_length=MAX_MESSAGES, examples=[[{"role": "user", "content": "Hello!"}]]),
]
System = Annotated[Parts | None, Meta(description="What the model is told before the conversation.")]


class OutputFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    schema: Annotated[JsonSchema, Meta(description="A keyword that cannot be enforced is a 400.")]


class OutputConfig(Struct, frozen=True, kw_only=True):
    """The form of the text, and how hard to think before it. Further keys are ignored."""

    format: Annotated[OutputFormat | None, Meta(description="A JSON schema; null: any text.")] = None
    effort: Annotated[Effort | None, Meta(description=EFFORT)] = None
    task_budget: NoEffect = UNSET


class CustomTool(Struct, frozen=True, kw_only=True):
    """A function and the JSON schema of its arguments. Further keys are ignored."""

    name: Annotated[FunctionName | None, Meta(description="Of a function.")] = None
    description: Text | None = None
    input_schema: Annotated[JsonSchema | None, Meta(description="Of a function.")] = None
    strict: Annotated[
        bool | None, Meta(description="true: a keyword of the schema that cannot be enforced is a 400.")
    ] = None
    type: Annotated[
        Tag | None,
        Meta(description="custom or null: a function. Any other is a tool that the server would run: it is left out."),
    ] = None
    allowed_callers: NoEffect = UNSET
    cache_control: Annotated[Raw | UnsetType, Meta(description="Of no effect: all is cached.")] = UNSET
    defer_loading: NoEffect = UNSET
    eager_input_streaming: NoEffect = UNSET
    input_examples: NoEffect = UNSET


Parallel = Annotated[bool | None, Meta(description="true: an answer calls once at most.")]


class AutoTool(Struct, tag_field="type", tag="auto", frozen=True, forbid_unknown_fields=True):
    """Tools are used as the model likes."""

    disable_parallel_tool_use: Parallel = None


class AnyTool(Struct, tag_field="type", tag="any", frozen=True, forbid_unknown_fields=True):
    """The answer uses tools, and says nothing else."""

    disable_parallel_tool_use: Parallel = None


class OneTool(Struct, tag_field="type", tag="tool", frozen=True, forbid_unknown_fields=True):
    """The answer uses one tool once."""

    name: FunctionName
    disable_parallel_tool_use: Annotated[bool | None, Meta(description="Of no effect: one is used once.")] = None


class NoTool(Struct, tag_field="type", tag="none", frozen=True, forbid_unknown_fields=True):
    """No tool is used, and none is shown to the model."""


Tools = Annotated[
    Annotated[list[CustomTool], Meta(max_length=MAX_TOOLS)] | None, Meta(description="Functions that may be called.")
]
ToolChoice = Annotated[
    AutoTool | AnyTool | OneTool | NoTool | None,
    Meta(description="auto, any, tool (one function), none; null: auto, where there are tools."),
]


ThinkingConfig = Annotated[
    ThinkingSwitch | None,
    Meta(
        description="Whether the model thinks, for templates with the variable enable_thinking or thinking; null: as "
        "they like."
    ),
]


class MessagesRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation to answer. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    messages: Messages
    max_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_TOKENS,
            description="Most tokens to generate; too many: what the context has left.",
            examples=[64],
        ),
    ]
    system: System = None
    stop_sequences: Annotated[
        Annotated[list[StopString], Meta(max_length=64)] | None,
        Meta(description="Strings that end the text and are not part of it."),
    ] = None
    stream: Annotated[bool | None, Meta(description="Reply in server-sent events.")] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None, Meta(description="0 is greedy; null: the model's own, or 1.")
    ] = None
    top_p: Annotated[
        TopP | None, Meta(description="Only the likeliest tokens that add up to this; null: the model's own, or 1.")
    ] = None
    top_k: Annotated[
        TopK | None, Meta(description="Only the k likeliest tokens; 0 or -1: all; null: the model's own, or all.")
    ] = None

    output_config: Annotated[OutputConfig | None, Meta(description="What the text must be.")] = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    thinking: ThinkingConfig = None

    mcp_servers: Unsupported = UNSET
    output_format: Annotated[
        OutputFormat | None, Meta(description="The older name of output_config.format; not both.")
    ] = None

    betas: NoEffect = UNSET
    cache_control: NoEffect = UNSET
    container: NoEffect = UNSET
    context_management: NoEffect = UNSET
    diagnostics: NoEffect = UNSET
    inference_geo: NoEffect = UNSET
    metadata: NoEffect = UNSET
    service_tier: NoEffect = UNSET
    speed: NoEffect = UNSET
    user_profile_id: NoEffect = UNSET
    workspace_id: NoEffect = UNSET


class CountTokensRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation whose tokens are to be counted. An unknown key is an error."""

    model: RequestedModel = ""
    messages: Messages
    system: System = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    thinking: ThinkingConfig = None

    mcp_servers: Unsupported = UNSET
    output_config: Annotated[
        OutputConfig | None, Meta(description="Its effort, for templates with a switch; its format has no tokens.")
    ] = None
    output_format: NoEffect = UNSET

    betas: NoEffect = UNSET
    cache_control: NoEffect = UNSET
    context_management: NoEffect = UNSET
    speed: NoEffect = UNSET
    user_profile_id: NoEffect = UNSET
    workspace_id: NoEffect = UNSET


class CountTokensReply(Struct, frozen=True):
    """What `usage` would say, whatever the cache holds."""

    input_tokens: int


class TextBlock(Struct, frozen=True, tag_field="type", tag="text"):
    """The answer's text."""

    text: str


class ThinkingBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """What the model thought first."""

    thinking: str
    signature: Annotated[Literal[""], Meta(description="Thoughts are not signed.")]


class ToolUseBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    """A call of a function."""

    id: str
    name: str
    input: Annotated[
        dict[str, Any], Meta(description='Arguments that are no JSON object are the text in {"INVALID_JSON": text}.')
    ]


Block = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Annotated[
    Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"],
    Meta(description="A cancelled answer ended its turn."),
]


class MessageUsage(Struct, frozen=True):
    """Tokens of an answer; all three of the input's numbers together are the prompt."""

    input_tokens: Annotated[int, Meta(description="Computed for this request.")]
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: Annotated[int, Meta(description="Not computed again.")]
    output_tokens: int


class MessageReply(Struct, frozen=True, kw_only=True):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: Annotated[str | None, Meta(description="The one that ended the text.")]
    usage: MessageUsage


class MessageEvent(Struct, frozen=True, kw_only=True):
    """The `data` of one server-sent event; `type` is the event's name, and says which of the other keys are there."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]
    message: MessageReply | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: Block | UnsetType = UNSET
    delta: dict[str, Any] | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET
    error: MessageErrorObject | UnsetType = UNSET


class MessageErrorObject(Struct, frozen=True):
    """Why a request failed. May have further keys: numbers that a client may act on."""

    message: Annotated[str, Meta(description="What went wrong, the limit, and what was given.")]
    type: Annotated[str, Meta(description="Anthropic's word.", examples=["invalid_request_error"])]
    param: Annotated[str | None, Meta(description="The field at fault, where there is one.", examples=["max_tokens"])]
    code: Annotated[str, Meta(description="Machine-readable reason.", examples=["invalid_value"])]


class MessageErrorReply(Struct, frozen=True):
    """An error reply of /v1/messages, in Anthropic's shape."""

    error: MessageErrorObject
    type: Literal["error"] = "error"
