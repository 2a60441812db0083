"""The routes beside `/v1/responses`: count the tokens of a request, and compact a conversation."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct

from lmserve.schemas.bounds import MAX_MESSAGES, RequestedModel, Text
from lmserve.schemas.hints import NoEffect
from lmserve.schemas.response_reply import CompactionItem, ResponseUsage, StoredMessage
from lmserve.schemas.responses import ConversationId, ConversationRef, InputItem, Previous, ResponseId, TextConfig
from lmserve.schemas.sampling import OutputLimit
from lmserve.schemas.thinking import Reasoning
from lmserve.schemas.tools import MAX_TOOLS, FlatToolChoice, ResponseTool

Input = Text | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]


class InputTokensRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request to count. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    input: Annotated[Input, Meta(description="As in /v1/responses.", examples=["Hello!"])]
    previous_response_id: Previous = None
    instructions: Annotated[Text | None, Meta(description="As in /v1/responses.")] = None
    tools: Annotated[
        Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None,
        Meta(description="As in /v1/responses. The tools that the model is shown are counted."),
    ] = None
    reasoning: Annotated[Reasoning | None, Meta(description="As in /v1/responses.")] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Meta(
            description="auto: count what is left after the oldest turns are dropped. It has no effect if the "
            "conversation fits into the context."
        ),
    ] = None
    text: Annotated[TextConfig | None, Meta(description="Has no effect: the format of the answer takes no tokens.")] = (
        None
    )
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | FlatToolChoice | None,
        Meta(description="Has no effect, except that it may limit the tools that the model is shown."),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="Has no effect.")] = None
    personality: NoEffect = UNSET
    conversation: Annotated[
        ConversationId | ConversationRef | None,
        Meta(description="As in /v1/responses. The conversation is not changed."),
    ] = None


class InputTokensReply(Struct, frozen=True, kw_only=True):
    """Number of tokens of the prompt that the model would get."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class CompactRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The conversation to compact. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    input: Annotated[
        Input | None,
        Meta(description="The conversation, or its new items. Null: there are no new items.", examples=["Hello!"]),
    ] = None
    previous_response_id: Previous = None
    instructions: Annotated[Text | None, Meta(description="A system message before the input.")] = None
    max_output_tokens: Annotated[
        OutputLimit,
        Meta(
            description="Maximum number of tokens of the summary. Null: 1024. -1, or a number that is too large: as "
            "many as fit into the context."
        ),
    ] = None
    image: NoEffect = UNSET
    prompt_cache_key: NoEffect = UNSET
    prompt_cache_options: NoEffect = UNSET
    prompt_cache_retention: NoEffect = UNSET
    service_tier: NoEffect = UNSET


class CompactReply(Struct, frozen=True, kw_only=True):
    """The compacted conversation: the input of the next request. `created_at` is in seconds since 1970."""

    id: ResponseId
    object: Literal["response.compaction"] = "response.compaction"
    created_at: int
    output: Annotated[
        list[StoredMessage | CompactionItem],
        Meta(description="The user's messages and the summary. Only lmserve can read the summary."),
    ]
    usage: ResponseUsage
