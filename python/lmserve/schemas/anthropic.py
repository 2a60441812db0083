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
    """A part of a text. The models are text-only: an image or a file is an error. Other keys are ignored."""

    type: Annotated[
        Tag,
        Meta(
            examples=["text"],
            description="text or tool_reference. In a tool's result, a part of any other type is left out, and the "
            "text says so.",
        ),
    ]
    text: Annotated[Text | None, Meta(description="For text.")] = None
    tool_name: Annotated[
        FunctionName | None, Meta(description="For tool_reference: the name of the tool that was found.")
    ] = None


Parts = Text | Annotated[list[TextPart], Meta(max_length=MAX_BLOCKS)]


class ContentBlock(Struct, frozen=True, kw_only=True):
    """A part of a message. The models are text-only: an image or a file is an error. Other keys are ignored."""

    type: Annotated[
        Tag,
        Meta(
            examples=["text"],
            description="text; for the user, tool_result; for the assistant, tool_use and thinking as they were "
            "received. redacted_thinking and the blocks of server tools are ignored.",
        ),
    ]
    text: Annotated[Text | None, Meta(description="For text.")] = None
    thinking: Annotated[Text | None, Meta(description="For thinking: the thoughts, for templates that read them.")] = (
        None
    )
    id: Annotated[Tag | None, Meta(description="For tool_use.")] = None
    name: Annotated[FunctionName | None, Meta(description="For tool_use.")] = None
    input: Annotated[Arguments | None, Meta(description="For tool_use.")] = None
    tool_use_id: Annotated[Tag | None, Meta(description="For tool_result: the id of the call that it answers.")] = None
    content: Annotated[Parts | Arguments | None, Meta(description="For tool_result. Null: no content.")] = None
    is_error: Annotated[bool | None, Meta(description='For tool_result: put "Error: " before its text.')] = None


Content = Text | Annotated[list[ContentBlock], Meta(max_length=MAX_BLOCKS)]


class InputMessage(Struct, frozen=True):
    """One message. Consecutive messages of one role are one turn. A final message of the assistant is continued.

    Other keys are ignored.
    """

    role: Annotated[
        Literal["user", "assistant", "system"],
        Meta(
            description="system: an instruction within the conversation. If the chat template allows none there, it is "
            "shown as the user's."
        ),
    ]
    content: Content


Messages = Annotated[
    list[InputMessage],
    Meta(min_length=1, max_length=MAX_MESSAGES, examples=[[{"role": "user", "content": "Hello!"}]]),
]
System = Annotated[Parts | None, Meta(description="Instructions for the model before the conversation.")]


class OutputFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    schema: Annotated[JsonSchema, Meta(description="A keyword that the server cannot enforce is a 400.")]


class OutputConfig(Struct, frozen=True, kw_only=True):
    """The format of the text, and how much the model thinks before it. Other keys are ignored."""

    format: Annotated[OutputFormat | None, Meta(description="A JSON schema. Null: any text.")] = None
    effort: Annotated[Effort | None, Meta(description=EFFORT)] = None
    task_budget: NoEffect = UNSET


class CustomTool(Struct, frozen=True, kw_only=True):
    """A function and the JSON schema of its arguments. Other keys are ignored."""

    name: Annotated[FunctionName | None, Meta(description="For type function.")] = None
    description: Text | None = None
    input_schema: Annotated[JsonSchema | None, Meta(description="For type function.")] = None
    strict: Annotated[
        bool | None, Meta(description="true: a keyword of the schema that the server cannot enforce is a 400.")
    ] = None
    type: Annotated[
        Tag | None,
        Meta(
            description="custom or null: a function. A tool of any other type would have to be run by the server and "
            "is ignored."
        ),
    ] = None
    allowed_callers: NoEffect = UNSET
    cache_control: Annotated[Raw | UnsetType, Meta(description="Has no effect: the server caches everything.")] = UNSET
    defer_loading: NoEffect = UNSET
    eager_input_streaming: NoEffect = UNSET
    input_examples: NoEffect = UNSET


Parallel = Annotated[bool | None, Meta(description="true: an answer has at most one call.")]


class AutoTool(Struct, tag_field="type", tag="auto", frozen=True, forbid_unknown_fields=True):
    """The model decides whether to use tools."""

    disable_parallel_tool_use: Parallel = None


class AnyTool(Struct, tag_field="type", tag="any", frozen=True, forbid_unknown_fields=True):
    """The answer consists of tool calls only."""

    disable_parallel_tool_use: Parallel = None


class OneTool(Struct, tag_field="type", tag="tool", frozen=True, forbid_unknown_fields=True):
    """The answer calls this tool once."""

    name: FunctionName
    disable_parallel_tool_use: Annotated[bool | None, Meta(description="Has no effect: the tool is called once.")] = (
        None
    )


class NoTool(Struct, tag_field="type", tag="none", frozen=True, forbid_unknown_fields=True):
    """The model is shown no tools and uses none."""


Tools = Annotated[
    Annotated[list[CustomTool], Meta(max_length=MAX_TOOLS)] | None,
    Meta(description="Functions that the model may call."),
]
ToolChoice = Annotated[
    AutoTool | AnyTool | OneTool | NoTool | None,
    Meta(description="auto, any, tool (one function) or none. Null: auto if there are tools."),
]


ThinkingConfig = Annotated[
    ThinkingSwitch | None,
    Meta(
        description="Whether the model thinks, for templates with the variable enable_thinking or thinking. Null: "
        "the template decides."
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
            description="Maximum number of tokens to generate. A number that is too large: as many as fit into the "
            "context.",
            examples=[64],
        ),
    ]
    system: System = None
    stop_sequences: Annotated[
        Annotated[list[StopString], Meta(max_length=64)] | None,
        Meta(description="Strings that end the text. They are not part of it."),
    ] = None
    stream: Annotated[bool | None, Meta(description="Reply in server-sent events.")] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="0 is greedy. Null: the model's default, or 1 if it has none."),
    ] = None
    top_p: Annotated[
        TopP | None,
        Meta(
            description="Sample only from the most likely tokens whose probabilities add up to this. Null: the model's "
            "default, or 1."
        ),
    ] = None
    top_k: Annotated[
        TopK | None,
        Meta(
            description="Sample only from the k most likely tokens. 0 or -1: from all tokens. Null: the model's "
            "default, or all."
        ),
    ] = None

    output_config: Annotated[
        OutputConfig | None, Meta(description="The format of the text, and how much the model thinks.")
    ] = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    thinking: ThinkingConfig = None

    mcp_servers: Unsupported = UNSET
    output_format: Annotated[
        OutputFormat | None, Meta(description="The older name of output_config.format. Give only one of them.")
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
    """The conversation to count. An unknown key is an error."""

    model: RequestedModel = ""
    messages: Messages
    system: System = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    thinking: ThinkingConfig = None

    mcp_servers: Unsupported = UNSET
    output_config: Annotated[
        OutputConfig | None,
        Meta(description="The effort counts, for templates with a switch. The format takes no tokens."),
    ] = None
    output_format: NoEffect = UNSET

    betas: NoEffect = UNSET
    cache_control: NoEffect = UNSET
    context_management: NoEffect = UNSET
    speed: NoEffect = UNSET
    user_profile_id: NoEffect = UNSET
    workspace_id: NoEffect = UNSET


class CountTokensReply(Struct, frozen=True):
    """The prompt's tokens, whether or not they are cached."""

    input_tokens: int


class TextBlock(Struct, frozen=True, tag_field="type", tag="text"):
    """The answer's text."""

    text: str


class ThinkingBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """What the model thought before it answered."""

    thinking: str
    signature: Annotated[Literal[""], Meta(description="Always empty: thoughts are not signed.")]


class ToolUseBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    """A call of a function."""

    id: str
    name: str
    input: Annotated[
        dict[str, Any],
        Meta(
            description='The arguments. If the model has written no valid JSON object, this is {"INVALID_JSON": text}.'
        ),
    ]


Block = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Annotated[
    Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"],
    Meta(description="A cancelled answer ends with end_turn."),
]


class MessageUsage(Struct, frozen=True):
    """Tokens of an answer. The three input numbers add up to the prompt."""

    input_tokens: Annotated[int, Meta(description="Tokens computed for this request.")]
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: Annotated[int, Meta(description="Tokens that came from the KV cache.")]
    output_tokens: int


class MessageReply(Struct, frozen=True, kw_only=True):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: Annotated[str | None, Meta(description="The stop sequence that ended the text.")]
    usage: MessageUsage


class MessageEvent(Struct, frozen=True, kw_only=True):
    """The `data` of one server-sent event. `type` is the event's name; which other keys are present depends on it."""

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
    """Why a request failed. It may have further keys: numbers that a client can use."""

    message: Annotated[str, Meta(description="What went wrong, the limit, and what was given.")]
    type: Annotated[str, Meta(description="Anthropic's error type.", examples=["invalid_request_error"])]
    param: Annotated[str | None, Meta(description="The field at fault, if there is one.", examples=["max_tokens"])]
    code: Annotated[str, Meta(description="Machine-readable reason.", examples=["invalid_value"])]


class MessageErrorReply(Struct, frozen=True):
    """An error reply of /v1/messages, in Anthropic's shape."""

    error: MessageErrorObject
    type: Literal["error"] = "error"
