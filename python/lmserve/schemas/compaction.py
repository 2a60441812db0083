"""What goes beside `/v1/responses`: the count of a request's tokens, and a conversation made short."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct

from lmserve.schemas.bounds import MAX_MESSAGES, RequestedModel, Text
from lmserve.schemas.hints import NoEffect
from lmserve.schemas.responses import (
    CompactionItem,
    ConversationId,
    ConversationRef,
    InputItem,
    Previous,
    ResponseId,
    ResponseUsage,
    StoredMessage,
    TextConfig,
)
from lmserve.schemas.sampling import OutputLimit
from lmserve.schemas.thinking import Reasoning
from lmserve.schemas.tools import MAX_TOOLS, FlatToolChoice, ResponseTool

Input = Text | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]


class InputTokensRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to count. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    input: Annotated[Input, Meta(description="As in /v1/responses.", examples=["Hello!"])]
    previous_response_id: Previous = None
    instructions: Annotated[Text | None, Meta(description="As in /v1/responses.")] = None
    tools: Annotated[
        Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None,
        Meta(description="As in /v1/responses: what the model is shown of them counts."),
    ] = None
    reasoning: Annotated[Reasoning | None, Meta(description="As in /v1/responses.")] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Meta(description="auto: count what is left once the oldest turns are dropped; of no effect where all fits."),
    ] = None
    text: Annotated[TextConfig | None, Meta(description="Of no effect: the form of the answer takes no tokens.")] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | FlatToolChoice | None,
        Meta(description="Of no effect, but for the tools that it allows."),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="Of no effect.")] = None
    personality: NoEffect = UNSET
    conversation: Annotated[
        ConversationId | ConversationRef | None, Meta(description="As in /v1/responses; it stays as it is.")
    ] = None


class InputTokensReply(Struct, frozen=True, kw_only=True):
    """Tokens of the prompt that the model would be given."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class CompactRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The conversation to make short. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    input: Annotated[
        Input | None, Meta(description="The conversation, or what is new in it; null: nothing is.", examples=["Hello!"])
    ] = None
    previous_response_id: Previous = None
    instructions: Annotated[Text | None, Meta(description="A system message before the input.")] = None
    max_output_tokens: Annotated[
        OutputLimit,
        Meta(description="Most tokens of the summary; null: 1024; -1, or too many: what the context has left."),
    ] = None
    image: NoEffect = UNSET
    prompt_cache_key: NoEffect = UNSET
    prompt_cache_options: NoEffect = UNSET
    prompt_cache_retention: NoEffect = UNSET
    service_tier: NoEffect = UNSET


class CompactReply(Struct, frozen=True, kw_only=True):
    """The conversation made short: the input of the next request. `created_at` is in seconds since 1970."""

    id: ResponseId
    object: Literal["response.compaction"] = "response.compaction"
    created_at: int
    output: Annotated[
        list[StoredMessage | CompactionItem],
        Meta(description="The user's messages, and the summary, an item that only this server's model reads."),
    ]
    usage: ResponseUsage
