"""What the core writes, against the schemas that describe it: types exact, no key unknown, none forgotten.

The core writes replies by hand, and the schemas describe them in the OpenAPI document. Nothing else ties the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from conftest import MODEL, Running
from lmserve.schemas.anthropic import MessageEvent, MessageReply
from lmserve.schemas.chat import ChatChunk, ChatReply
from lmserve.schemas.completions import CompletionChunk, CompletionReply
from lmserve.schemas.generate import GenerateReply
from lmserve.schemas.interactive import InteractiveReply
from lmserve.schemas.response_reply import ResponseEvent, ResponseReply

HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"type": "object", "properties": {"city": {"enum": ["Ulm"]}}, "required": ["city"]}
CHAT_TOOLS = {
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": CALL}}],
    "tool_choice": "required",
    "max_tokens": 300,
    "ignore_eos": False,
}
CHAT_CUSTOM = {"tools": [{"type": "custom", "custom": {"name": "say"}}], "tool_choice": "required", "max_tokens": 300}
CHAT_FUNCTIONS = {
    "functions": [{"name": "weather", "parameters": CALL}],
    "function_call": {"name": "weather"},
    "max_tokens": 300,
    "ignore_eos": False,
}
CHAT = {"model": MODEL, "messages": HELLO, "max_tokens": 4, "ignore_eos": True}
USAGE = {"stream_options": {"include_usage": True}}

# (path, schema of a whole reply, schema of a stream's frame, what a request has, what it may have besides)
ROUTES: dict[str, tuple[str, Any, Any, dict[str, Any], list[dict[str, Any]]]] = {
    "generate": (
        "/generate",
        GenerateReply,
        GenerateReply,
        {"prompt": "Hello", "request_output_len": 4, "ignore_eos": True},
        [{}, {"instance_id": 4711}],
    ),
    "interactive": (
        "/v1/chat/interactive",
        InteractiveReply,
        InteractiveReply,
        {"prompt": "Hello", "request_output_len": 4, "ignore_eos": True},
        [{}],
    ),
    "chat": (
        "/v1/chat/completions",
        ChatReply,
        ChatChunk,
        CHAT,
        [
            {},
            {"n": 2},
            {"logprobs": True, "top_logprobs": 2},
            {"prompt_logprobs": 1},
            {"return_token_ids": True},
            CHAT_TOOLS,
            CHAT_CUSTOM,
            CHAT_FUNCTIONS,
        ],
    ),
    "completions": (
        "/v1/completions",
        CompletionReply,
        CompletionChunk,
        {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "ignore_eos": True},
        [
            {},
            {"n": 2},
            {"logprobs": 2},
            {"echo": True, "logprobs": 1},
            {"prompt_logprobs": 1},
            {"return_token_ids": True},
        ],
    ),
    "responses": (
        "/v1/responses",
        ResponseReply,
        ResponseEvent,
        {"model": MODEL, "input": "Hello", "max_output_tokens": 4, "ignore_eos": True},
        [
            {},
            {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
            {
                "tools": [{"type": "function", "name": "weather", "parameters": CALL}],
                "tool_choice": "required",
                "max_output_tokens": 300,
                "ignore_eos": False,
            },
        ],
    ),
    "messages": (
        "/v1/messages",
        MessageReply,
        MessageEvent,
        {"model": MODEL, "messages": HELLO, "max_tokens": 4},
        [
            {},
            {"tools": [{"name": "weather", "input_schema": CALL}], "tool_choice": {"type": "any"}, "max_tokens": 300},
        ],
    ),
}

# What the requests above do not bring about: errors, thoughts, which the model here has none of, and custom tools.
ERROR = {"ErrorObject.code", "ErrorObject.message", "ErrorObject.param", "ErrorObject.type"}
REASONING_TOKENS = {"ChatUsage.completion_tokens_details", "CompletionTokensDetails.reasoning_tokens"}
UNSEEN = {
    "generate": ERROR | {"GenerateReply.error"},
    "interactive": ERROR | {"InteractiveReply.error"},
    "chat": REASONING_TOKENS | {"AssistantMessage.reasoning_content", "ChatDelta.reasoning_content"},
    "completions": REASONING_TOKENS,
    "responses": {
        "ConversationRef.id",
        "OutputCall.namespace",
        "OutputCustomCall.call_id",
        "OutputCustomCall.id",
        "OutputCustomCall.input",
        "OutputCustomCall.name",
        "OutputCustomCall.status",
        "OutputReasoning.content",
        "OutputReasoning.id",
        "OutputReasoning.status",
        "OutputReasoning.summary",
        "ReasoningText.text",
        "ResponseEvent.input",
        "ResponseFailure.code",
        "ResponseFailure.message",
    },
    "messages": {
        "MessageErrorObject.code",
        "MessageErrorObject.message",
        "MessageErrorObject.param",
        "MessageErrorObject.type",
        "MessageEvent.error",
        "ThinkingBlock.signature",
        "ThinkingBlock.thinking",
    },
}


def keys(value: Any, kind: msgspec.inspect.Type) -> Iterator[tuple[str, bool]]:
    """(key, as `Struct.key`; whether that struct declares it) of each key of `value`, which is of `kind`."""
    if isinstance(kind, msgspec.inspect.Metadata):
        yield from keys(value, kind.type)
    elif isinstance(kind, msgspec.inspect.UnionType):
        fitting = [option for option in kind.types if fits(value, option)]
        for option in fitting[:1]:
            yield from keys(value, option)
    elif isinstance(kind, msgspec.inspect.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field for field in kind.fields}
        for key, each in value.items():
            yield f"{kind.cls.__name__}.{key}", key in fields or key == kind.tag_field
            if key in fields:
                yield from keys(each, fields[key].type)
    elif isinstance(kind, msgspec.inspect.ListType) and isinstance(value, list):
        for each in value:
            yield from keys(each, kind.item_type)


def fits(value: Any, kind: msgspec.inspect.Type) -> bool:
    if isinstance(kind, msgspec.inspect.Metadata):
        return fits(value, kind.type)
    if isinstance(kind, msgspec.inspect.StructType):
        return isinstance(value, dict) and (kind.tag is None or value.get(kind.tag_field) == kind.tag)
    return isinstance(kind, msgspec.inspect.ListType) and isinstance(value, list)


def declared(kind: msgspec.inspect.Type) -> Iterator[str]:
    """All keys that `kind` declares, at any depth, as `Struct.key`."""
    if isinstance(kind, msgspec.inspect.Metadata):
        yield from declared(kind.type)
    elif isinstance(kind, msgspec.inspect.UnionType):
        for option in kind.types:
            yield from declared(option)
    elif isinstance(kind, msgspec.inspect.ListType):
        yield from declared(kind.item_type)
    elif isinstance(kind, msgspec.inspect.StructType):
        for field in kind.fields:
            yield f"{kind.cls.__name__}.{field.encode_name}"
            yield from declared(field.type)


def frames(body: bytes) -> list[bytes]:
    """The JSON of a stream's frames: NUL-terminated, server-sent events, or lines."""
    if b"\0" in body:
        return body.split(b"\0")[:-1]
    if b"data: " in body:
        lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
        return [line for line in lines if line != b"[DONE]"]
    return body.splitlines()


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("route", ROUTES)
def test_replies_are_what_the_schemas_say(client: httpx.Client, route: str) -> None:
    path, whole, frame, request, options = ROUTES[route]
    seen: set[str] = set()
    for more in options:
        for stream in (False, True):
            if stream and "prompt_logprobs" in more:
                continue  # They come with whole replies only.
            for usage in ({}, USAGE) if stream and route in ("chat", "completions") else ({},):
                reply = client.post(path, json=request | more | usage | {"stream": stream})
                assert reply.status_code == 200, reply.text
                texts = frames(reply.content) if stream else [reply.content]
                assert texts
                schema = frame if stream else whole
                for text in texts:
                    msgspec.json.decode(text, type=schema, strict=True)
                    found = list(keys(json.loads(text), msgspec.inspect.type_info(schema)))
                    assert [key for key, known in found if not known] == []
                    seen |= {key for key, _ in found}
    told = set(declared(msgspec.inspect.type_info(whole))) | set(declared(msgspec.inspect.type_info(frame)))
    assert sorted(told - seen) == sorted(UNSEEN[route])


def test_an_unknown_key_is_found() -> None:
    kind = msgspec.inspect.type_info(GenerateReply)
    reply = {"text": "", "usage": {"prompt_tokens": 1, "surprise": 2}}
    assert [key for key, known in keys(reply, kind) if not known] == ["GenerateUsage.surprise"]
