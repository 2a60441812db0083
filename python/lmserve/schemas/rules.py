"""What Python's types leave open and handlers refuse with 400, as JSON Schema: which values go together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any, Final

from msgspec import Struct

from lmserve.schemas.anthropic import (
    LEFT_OUT,
    ContentBlock,
    CountTokensRequest,
    CustomTool,
    InputMessage,
    MessagesRequest,
    TextPart,
)
from lmserve.schemas.bounds import MAX_TEXT_CHARS, MAX_TOKENS
from lmserve.schemas.chat import ChatMessage, ChatRequest, ContentPart
from lmserve.schemas.compaction import CompactRequest, InputTokensRequest
from lmserve.schemas.completion_sampling import StreamOptions
from lmserve.schemas.completions import MAX_PROMPT_TOKENS, CompletionRequest
from lmserve.schemas.embeddings import MAX_INPUT_TOKENS, EmbeddingsRequest
from lmserve.schemas.generate import GenerateRequest
from lmserve.schemas.guided import NamedSchema, StructuredOutputs
from lmserve.schemas.interactive import InteractiveRequest
from lmserve.schemas.responses import InputItem, InputPart, ResponsesRequest, SchemaFormat
from lmserve.schemas.retention import Retention
from lmserve.schemas.sessions import TurnRequest
from lmserve.schemas.tei import AnyRerankRequest, InputsRequest
from lmserve.schemas.tokenize import EncodeRequest, TokenizeRequest
from lmserve.schemas.tools import FlatTool, FlatToolChoice, NamedToolChoice, ReplayedCall, ResponseTool, Tool

Json = dict[str, Any]

NULL: Final[Json] = {"type": "null"}
TOKEN: Final[Json] = {"type": "integer", "minimum": 0, "maximum": MAX_TOKENS}


def one_kind(text: Json, most: int) -> Json:
    """A text, or up to `most` of them, of token ids, or of lists of token ids, and no mixture of these."""

    def list_of(items: Json) -> Json:
        return {"type": "array", "items": items, "minItems": 1, "maxItems": most}

    return {"anyOf": [text, list_of(text), list_of(TOKEN), list_of(list_of(TOKEN))]}


NOT_ZERO: Final[Json] = {"not": {"const": 0}}
NO_CANCEL: Final[Json] = {"not": {"const": True}}

# As a schema, false allows no text at all.
NOT_FALSE: Final[Json] = {"not": {"const": False}}

SYSTEM: Final[Json] = {
    "type": ["string", "array", "null"],
    "items": {"properties": {"type": {"enum": ["text", "tool_reference"]}}},
}

FIELDS: Final[Mapping[type[Struct], Mapping[str, Json]]] = {
    NamedSchema: {"schema": NOT_FALSE},
    StructuredOutputs: {"json": NOT_FALSE},
    SchemaFormat: {"schema": NOT_FALSE},
    ChatRequest: {"max_tokens": NOT_ZERO, "max_completion_tokens": NOT_ZERO, "guided_json": NOT_FALSE},
    ResponsesRequest: {"max_output_tokens": NOT_ZERO, "stop": NO_CANCEL},
    CompactRequest: {"max_output_tokens": NOT_ZERO},
    TurnRequest: {"max_tokens": NOT_ZERO},
    InteractiveRequest: {"adapter_name": NULL, "image_url": NULL},
    MessagesRequest: {"system": SYSTEM},
    CountTokensRequest: {"system": SYSTEM},
    CompletionRequest: {
        "prompt": one_kind({"type": "string", "maxLength": MAX_TEXT_CHARS}, MAX_PROMPT_TOKENS),
        "stop": NO_CANCEL,
        "guided_json": NOT_FALSE,
    },
    InputsRequest: {
        "inputs": one_kind({"type": "string", "minLength": 1, "maxLength": MAX_TEXT_CHARS}, MAX_INPUT_TOKENS),
    },
    EmbeddingsRequest: {
        "input": one_kind({"type": "string", "minLength": 1, "maxLength": MAX_TEXT_CHARS}, MAX_INPUT_TOKENS)
    },
}

TEXT: Final[Json] = {"type": "string"}
LIST: Final[Json] = {"type": "array"}
LIVE: Final[Json] = {"not": {"enum": [-1, "-1", None]}}


TEMPLATE_FIELDS: Final = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


def optional(**fields: Json) -> Json:
    """Each field is as its schema says, or absent."""
    return {"properties": fields}


def required(**fields: Json) -> Json:
    """Each field is there, and as its schema says."""
    return {"properties": fields, "required": list(fields)}


def null(*names: str) -> Json:
    """The fields are null or absent."""
    return optional(**dict.fromkeys(names, NULL))


def off(*names: str) -> Json:
    """The fields are false, null or absent."""
    return optional(**{key: {"enum": [False, None]} for key in names})


def on(name: str) -> Json:
    """The field is true."""
    return required(**{name: {"const": True}})


def either(*options: Json) -> Json:
    """At least one of the options holds."""
    return {"anyOf": list(options)}


def both(*options: Json) -> Json:
    """All of the options hold."""
    return {"allOf": list(options)}


def at_most_one(**idle: Json) -> Json:
    """No two of the fields are there and other than their schemas say."""
    used = {name: {"not": schema} for name, schema in idle.items()}
    return {"not": either(*(required(**{a: used[a], b: used[b]}) for a, b in combinations(used, 2)))}


def other_than(*words: str) -> Json:
    """Another text than these."""
    return {"type": "string", "not": {"enum": list(words)}}


def text_or_list_of(*types: str) -> Json:
    """A text, or a list of parts of these types."""
    return {"type": ["string", "array"], "items": required(type={"enum": list(types)})}


WORDS: Final = either(TEXT, {"type": "array", "minItems": 1})
TEXT_PART: Final = required(type={"const": "text"}, text=TEXT)
OBJECT: Final[Json] = {"type": "object"}
# Each rule with alternatives doubles what a reader of the schema has to consider, so that rules on one field are one.
# Of chat completions it would be too much: that tool_choice needs tools, and which guides go together, is not said.
STREAMED: Final = either(
    both(on("stream"), null("prompt_logprobs")),
    both(off("stream"), null("stream_options")),
)
CONTINUED: Final = either(
    off("continue_final_message"),
    both(off("add_generation_prompt"), required(messages=LIST)),
)

NOTHING: Final[Json] = {"enum": [None, []]}
GIVEN: Final[Json] = {"type": ["string", "array"]}
READ: Final = ("input_text", "output_text", "text")
TEXTS: Final = text_or_list_of(*READ, "refusal")
SAID: Final = either(NULL, TEXTS)
THOUGHTS: Final = text_or_list_of("reasoning_text", "text", "refusal")
ITEMS: Final = [
    *("message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output", "reasoning"),
    "compaction",
]
# A tool of any other kind would be the server's to run, and is left out whatever it holds.
OTHER_TOOL: Final = required(type=other_than("function", "custom"))
NAMED: Final = required(name=TEXT)
GUIDES: Final = ("json", "regex", "choice", "grammar")
GUIDED: Final = at_most_one(
    response_format=either(NULL, required(type={"const": "text"})),
    structured_outputs={"type": ["object", "null"], **null(*GUIDES)},
    **{f"guided_{guide}": NULL for guide in GUIDES},
)

SERVERS: Final = either({"enum": list(LEFT_OUT)}, {"type": "string", "pattern": "._tool_result$"})


def blocks(*types: str) -> Json:
    """A text, or a list of blocks of these types, and of those that are left out."""
    return {"type": ["string", "array"], "items": required(type=either({"enum": list(types)}, SERVERS))}


WORDS_OR_NULL: Final = ["string", "array", "null"]

RULES: Final[Mapping[type[Struct], tuple[Json, ...]]] = {
    AnyRerankRequest: (
        either(
            both(required(texts=LIST), null("documents", "top_n", "return_documents")),
            both(
                required(documents=LIST),
                null("texts", "raw_scores", "return_text", "truncate", "truncation_direction"),
            ),
        ),
    ),
    GenerateRequest: (
        either(both(off("stop"), null("retention")), required(instance_id=LIVE)),
        # A verb on a session needs no words.
        either(
            required(prompt=WORDS),
            on("stop"),
            both(on("sequence_end"), required(request_output_len={"const": 0})),
        ),
    ),
    TurnRequest: (
        either(both(required(prompt=TEXT), null("messages")), both(required(messages=LIST), null("prompt"))),
    ),
    InteractiveRequest: (
        either(both(off("cancel"), optional(stop=NO_CANCEL)), required(session_id=LIVE)),
        either(
            required(prompt=WORDS),
            on("cancel"),
            on("stop"),
            both(off("interactive_mode"), required(request_output_len={"const": 0})),
        ),
    ),
    ResponsesRequest: (
        either(off("background"), optional(store={"enum": [True, None]})),
        at_most_one(previous_response_id=NULL, conversation=NULL),
        either(
            optional(top_logprobs={"enum": [0, None]}),
            required(include={"type": "array", "contains": {"const": "message.output_text.logprobs"}}),
        ),
    ),
    InputTokensRequest: (at_most_one(previous_response_id=NULL, conversation=NULL),),
    InputItem: (
        either(
            both(required(role=TEXT, content=TEXTS), optional(type={"enum": ["message", None]})),
            required(
                type={"const": "function_call"}, call_id=TEXT, name=TEXT, arguments={"type": ["string", "object"]}
            ),
            required(type={"const": "custom_tool_call"}, call_id=TEXT, name=TEXT, input=TEXT),
            required(type={"enum": ["function_call_output", "custom_tool_call_output"]}, call_id=TEXT, output=GIVEN),
            both(required(type={"const": "reasoning"}), optional(content=either(NULL, THOUGHTS))),
            required(type={"const": "compaction"}, encrypted_content=TEXT),
            required(type=other_than(*ITEMS)),
        ),
    ),
    # What is no text is left out of what a tool gave, and refused elsewhere.
    InputPart: (either(required(text=TEXT), required(type=other_than(*READ, "reasoning_text"))),),
    ContentPart: (either(required(text=TEXT), required(type=other_than(*READ))),),
    ChatMessage: (
        either(
            both(required(role={"const": "tool"}), null("function_call"), optional(tool_calls=NOTHING)),
            both(required(role={"const": "assistant"}), null("tool_call_id"), optional(content=SAID)),
            both(
                optional(tool_calls=NOTHING, tool_call_id=NULL, function_call=NULL),
                either(
                    both(required(role={"enum": ["system", "developer", "user"]}), optional(content=SAID)),
                    required(role={"const": "function"}),
                ),
            ),
        ),
    ),
    ReplayedCall: (
        either(
            both(optional(type={"const": "function"}), required(function=OBJECT)),
            required(type={"const": "custom"}, custom=OBJECT),
        ),
    ),
    Tool: (
        either(
            required(type={"const": "function"}, function=OBJECT),
            required(type={"const": "custom"}, custom=OBJECT),
            OTHER_TOOL,
        ),
    ),
    NamedToolChoice: (
        either(
            required(type={"const": "function"}, function=OBJECT),
            required(type={"const": "custom"}, custom=OBJECT),
            required(type={"const": "allowed_tools"}, allowed_tools=OBJECT),
            required(type=other_than("function", "custom", "allowed_tools")),
        ),
    ),
    FlatTool: (either(NAMED, OTHER_TOOL),),
    ResponseTool: (either(NAMED, required(type=other_than("function", "custom", "namespace"))),),
    FlatToolChoice: (either(NAMED, OTHER_TOOL),),
    CustomTool: (
        either(
            required(name=TEXT, input_schema=OBJECT),
            required(type={"type": "string", "not": {"const": "custom"}}),
        ),
    ),
    MessagesRequest: (either(null("output_format"), null("output_config"), optional(output_config=null("format"))),),
    StructuredOutputs: (at_most_one(**dict.fromkeys(GUIDES, NULL)),),
    TextPart: (either(TEXT_PART, required(type=other_than("text"))),),
    ContentBlock: (
        either(
            TEXT_PART,
            required(type={"const": "thinking"}, thinking=TEXT),
            required(type={"const": "tool_use"}, id=TEXT, name=TEXT, input={"type": "object"}),
            both(required(type={"const": "tool_result"}, tool_use_id=TEXT), optional(content={"type": WORDS_OR_NULL})),
            required(type=SERVERS),
        ),
    ),
    InputMessage: (
        either(
            required(role={"const": "user"}, content=blocks("text", "tool_result")),
            required(role={"const": "assistant"}, content=blocks("text", "thinking", "tool_use")),
            required(role={"const": "system"}, content=blocks("text")),
        ),
    ),
    Retention: (
        either(
            both(required(hold=TEXT), optional(drop={"const": False})),
            both(null("hold"), required(drop={"const": True})),
        ),
    ),
    StreamOptions: (either(off("continuous_usage_stats"), on("include_usage")),),
    ChatRequest: (
        STREAMED,
        CONTINUED,
        either(null("top_logprobs"), on("logprobs")),
        either(
            both(required(session_id=LIVE), optional(n={"enum": [1, None]}), null("prompt_logprobs")),
            both(
                optional(session_id={"enum": [-1, "-1", None]}, stop=NO_CANCEL), off("renew_session"), null("retention")
            ),
        ),
    ),
    CompletionRequest: (STREAMED, GUIDED),
    TokenizeRequest: (
        CONTINUED,
        either(
            both(required(prompt=TEXT), null("messages", *TEMPLATE_FIELDS)),
            both(required(messages=LIST), null("prompt")),
        ),
    ),
    EncodeRequest: (either(off("do_preprocess"), optional(add_bos={"const": True})),),
}
