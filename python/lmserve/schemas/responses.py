"""Requests of `/v1/responses`: OpenAI's Responses API, with stored answers."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, Struct

from lmserve.schemas.bounds import MAX_MESSAGES, RequestedModel, Role, Tag, Text
from lmserve.schemas.guided import JsonObjectFormat, JsonSchema, TextFormat
from lmserve.schemas.hints import NoEffect, Unsupported
from lmserve.schemas.sampling import OutputLimit, SamplingRequest
from lmserve.schemas.thinking import Reasoning
from lmserve.schemas.tools import MAX_TOOLS, Arguments, FlatToolChoice, FunctionName, ResponseTool

MAX_PARTS: Final = 1024
MAX_PAGE: Final = 100

ResponseId = Annotated[str, Meta(max_length=64, examples=["resp_0123456789abcdef"])]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


Previous = Annotated[
    ResponseId | None,
    Meta(
        description="The id of a stored response to continue, token for token. The stored response is kept and can "
        "be continued again."
    ),
]


ConversationId = Annotated[str, Meta(max_length=64, examples=["conv_0123456789abcdef0123456789abcdef"])]


class ConversationRef(Struct, frozen=True):
    """Refers to a conversation by its id."""

    id: ConversationId


class InputPart(Struct, frozen=True):
    """A part of a message's content. The models are text-only: any other type is an error. Other keys are ignored."""

    type: Annotated[
        Tag, Meta(examples=["input_text"], description="input_text, output_text, text, reasoning_text or refusal.")
    ]
    text: Text | None = None
    refusal: Text | None = None


Parts = Text | Annotated[list[InputPart], Meta(max_length=MAX_PARTS)]


class InputItem(Struct, frozen=True, kw_only=True):
    """A message, a call, or the output of a call. Items of an earlier response's output may be sent back as received.

    Other keys are ignored.
    """

    type: Annotated[
        Tag | None,
        Meta(
            description="message, function_call, function_call_output, custom_tool_call, custom_tool_call_output, "
            "reasoning or compaction. Null: message. Items of other types are ignored."
        ),
    ] = None
    role: Annotated[Role | None, Meta(description="For a message.")] = None
    content: Annotated[
        Parts | None,
        Meta(
            description="For a message: its content. For reasoning: parts of type reasoning_text, for templates that "
            "read them."
        ),
    ] = None
    call_id: Annotated[Tag | None, Meta(description="For a call and its output.")] = None
    name: Annotated[FunctionName | None, Meta(description="For a call: the function's name.")] = None
    namespace: Annotated[FunctionName | None, Meta(description="For a call: the function's namespace.")] = None
    arguments: Annotated[
        Text | Arguments | None, Meta(description="For a call: its arguments in JSON, as text or as an object.")
    ] = None
    input: Annotated[Text | None, Meta(description="For a call of a custom tool: its text.")] = None
    output: Annotated[Parts | None, Meta(description="For the output of a call.")] = None
    encrypted_content: Annotated[
        Text | None,
        Meta(description="For compaction: what /v1/responses/compact returned. For reasoning: has no effect."),
    ] = None


class SchemaFormat(Struct, tag_field="type", tag="json_schema", frozen=True, kw_only=True, forbid_unknown_fields=True):
    """JSON that follows a schema."""

    schema: JsonSchema | bool
    name: Annotated[Tag | None, Meta(description="Has no effect.")] = None
    description: Annotated[Text | None, Meta(description="Has no effect.")] = None
    strict: Annotated[
        bool | None,
        Meta(
            description="true: a keyword that the server cannot enforce is a 400. Otherwise such keywords are ignored."
        ),
    ] = None


class TextConfig(Struct, frozen=True, kw_only=True):
    """The format of the text. Other keys are ignored."""

    format: Annotated[
        TextFormat | JsonObjectFormat | SchemaFormat | None,
        Meta(description="The format of the text: any text, a JSON object, or JSON that follows a schema."),
    ] = None
    verbosity: NoEffect = UNSET


class ResponsesRequest(SamplingRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for an answer. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    input: Annotated[
        Text | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)],
        Meta(
            description="One user message, or a list of items. With previous_response_id, only the new ones.",
            examples=["Hello!"],
        ),
    ]
    previous_response_id: Previous = None
    instructions: Annotated[
        Text | None,
        Meta(description="A system message before the input. It is not repeated if the conversation has it already."),
    ] = None
    store: Annotated[bool | None, Meta(description="Store the response. Null: true.")] = None
    stream: Annotated[bool | None, Meta(description="Reply in server-sent events.")] = None
    background: Annotated[
        bool | None,
        Meta(
            description="Run the request even if the client disconnects. Without stream, the server replies at once, "
            "and GET shows the progress. With stream, GET can stream the events again. Not allowed with "
            "store false."
        ),
    ] = None
    max_output_tokens: Annotated[
        OutputLimit,
        Meta(
            description="Maximum number of tokens to generate. Null, -1, or a number that is too large: as many as fit "
            "into the context."
        ),
    ] = None
    include: Annotated[
        Annotated[list[Tag], Meta(max_length=16)] | None,
        Meta(
            description="What else to report. Only message.output_text.logprobs has an effect.",
            examples=[["message.output_text.logprobs"]],
        ),
    ] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(description="Report this many alternatives to each token. Needs message.output_text.logprobs in include."),
    ] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Meta(description="auto: drop the oldest turns of a conversation that exceeds the context. Null: disabled."),
    ] = None
    metadata: Annotated[Metadata | None, Meta(description="Stored with the response.")] = None
    user: Annotated[Tag | None, Meta(description="Stored with the response.")] = None
    tools: Annotated[
        Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None,
        Meta(
            description="Functions and custom tools that the model may call, and namespaces of these. Tools that the "
            "server would have to run are ignored."
        ),
    ] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | FlatToolChoice | None,
        Meta(description="none, auto, required, one tool, or allowed_tools. Null: auto if there are tools."),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="false: an answer has at most one call. Null: true.")
    ] = None
    text: Annotated[TextConfig | None, Meta(description="The format of the text.")] = None

    reasoning: Annotated[Reasoning | None, Meta(description="How much the model thinks.")] = None

    prompt_cache_key: Annotated[
        Tag | None,
        Meta(
            description="Names the conversation that the input may continue, if no agent's header names one. See Lanes "
            "in docs/sessions.md."
        ),
    ] = None

    conversation: Annotated[
        ConversationId | ConversationRef | None,
        Meta(
            description="The conversation to continue. The model reads its items before the input, and the server adds "
            "the input and the answer to them. Not allowed with previous_response_id."
        ),
    ] = None
    image: Unsupported = UNSET
    moderation: Unsupported = UNSET
    prompt: Unsupported = UNSET

    access_programs: NoEffect = UNSET
    background_options: NoEffect = UNSET
    client_metadata: NoEffect = UNSET
    context_management: NoEffect = UNSET
    max_tool_calls: NoEffect = UNSET
    prompt_cache_options: NoEffect = UNSET
    prompt_cache_retention: NoEffect = UNSET
    safety_identifier: NoEffect = UNSET
    service_tier: NoEffect = UNSET
    stream_options: NoEffect = UNSET
