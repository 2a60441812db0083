"""Replies of `/v1/responses`: responses, their events, and the items that are stored of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import Role
from lmserve.schemas.chat import TokenLogprob
from lmserve.schemas.responses import ConversationRef, ResponseId


class OutputText(Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    """The text of an answer."""

    text: str
    annotations: Annotated[list[Any], Meta(max_length=0)] = []
    logprobs: Annotated[
        list[TokenLogprob], Meta(description="Log-probability of each token, if include asked for it.")
    ] = []


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """An answer."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class OutputCall(Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A call of a function. The model may write arguments that are not valid JSON."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    namespace: Annotated[str | UnsetType, Meta(description="The function's namespace, if it has one.")] = UNSET
    arguments: Annotated[str, Meta(description="The arguments as JSON text.")]


class OutputCustomCall(Struct, frozen=True, kw_only=True, tag_field="type", tag="custom_tool_call"):
    """A call of a custom tool."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    input: str


class ReasoningText(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"):
    """Thoughts."""

    text: str


class OutputReasoning(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought before it answered."""

    id: str
    summary: Annotated[list[Any], Meta(max_length=0)] = []
    status: ItemStatus
    content: list[ReasoningText]


OutputItem = OutputMessage | OutputCall | OutputCustomCall | OutputReasoning


class InputTokensDetails(Struct, frozen=True):
    """Details of the input's tokens."""

    cached_tokens: Annotated[int, Meta(description="Tokens that came from the KV cache.")]
    cache_write_tokens: Literal[0] = 0


class OutputTokensDetails(Struct, frozen=True):
    """Details of the output's tokens."""

    reasoning_tokens: int


class ResponseUsage(Struct, frozen=True):
    """Tokens of a response. The input includes the conversation before it."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(Struct, frozen=True):
    """Why a response failed."""

    code: Annotated[str, Meta(examples=["server_error"])]
    message: str


class IncompleteDetails(Struct, frozen=True):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class Asked(Struct, frozen=True, kw_only=True):
    """The fields that a response repeats from its request."""

    background: bool
    conversation: ConversationRef | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None


class ResponseReply(Asked, frozen=True, kw_only=True):
    """A response; `created_at` is in seconds since 1970."""

    id: ResponseId
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "cancelled", "failed"]
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = None


class ResponseEvent(Struct, frozen=True, kw_only=True):
    """The `data` of one server-sent event. `type` is the event's name; which other keys are present depends on it."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.custom_tool_call_input.delta",
        "response.custom_tool_call_input.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: Annotated[int, Meta(description="Counted from 0.")]
    response: ResponseReply | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    input: str | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET


class StoredPart(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a stored message."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Meta(max_length=0)] | UnsetType = UNSET


class StoredMessage(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """A stored message."""

    id: str
    role: Role
    status: ItemStatus = "completed"
    content: list[StoredPart]


class StoredCustomOutput(Struct, frozen=True, kw_only=True, tag_field="type", tag="custom_tool_call_output"):
    """The output of a call of a custom tool."""

    id: str
    status: Literal["completed"] = "completed"
    call_id: str
    output: str


class StoredOutput(Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call_output"):
    """The output of a call."""

    id: str
    status: Literal["completed"] = "completed"
    call_id: str
    output: str


class CompactionItem(Struct, frozen=True, kw_only=True, tag_field="type", tag="compaction"):
    """A summary of a conversation."""

    id: str
    encrypted_content: Annotated[str, Meta(description="The name of this format, followed by the summary in Base64.")]


StoredItem = (
    StoredMessage | OutputCall | OutputCustomCall | StoredOutput | StoredCustomOutput | OutputReasoning | CompactionItem
)


class ItemList(Struct, frozen=True, kw_only=True):
    """A page of items."""

    object: Literal["list"] = "list"
    data: list[StoredItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseDeleted(Struct, frozen=True, kw_only=True):
    """The response is deleted, together with what only it needed."""

    id: ResponseId
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
