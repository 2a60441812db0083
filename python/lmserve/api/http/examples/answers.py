"""Examples of requests for texts, in every form but OpenAI's responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from lmserve.api.http.examples.values import ASKED, CITY, CREATED, MODEL, TURN_USAGE, WEATHER
from lmserve.schemas.anthropic import CountTokensReply, CountTokensRequest, MessageEvent, MessageReply, MessagesRequest
from lmserve.schemas.chat import ChatChunk, ChatReply, ChatRequest
from lmserve.schemas.completions import CompletionChunk, CompletionReply, CompletionRequest
from lmserve.schemas.generate import GenerateReply, GenerateRequest
from lmserve.schemas.interactive import InteractiveReply, InteractiveRequest

USAGE: Final = {
    "prompt_tokens": 31,
    "completion_tokens": 4,
    "total_tokens": 35,
    "prompt_tokens_details": {"cached_tokens": 16},
}
MESSAGE_USAGE: Final = {
    "input_tokens": 15,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 16,
    "output_tokens": 6,
}
ANSWER: Final = {"role": "assistant", "content": "Hello, how are you?", "refusal": None}
CALL: Final = {"id": "call_1f2e3d", "type": "function", "function": {"name": "get_weather"}}
CALLED: Final = {**CALL, "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


def _chat(kind: str, choice: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    head = {"id": "chatcmpl-1f2e3d", "object": kind, "created": CREATED, "model": MODEL}
    return {**head, "choices": [{"index": 0, **choice}], **more}


def _completion(choice: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    head = {"id": "cmpl-1f2e3d", "object": "text_completion", "created": CREATED, "model": MODEL}
    return {**head, "choices": [{"index": 0, "logprobs": None, **choice}], **more}


EXAMPLES: Final[Mapping[type[Struct], tuple[Any, ...]]] = {
    GenerateRequest: (
        {"prompt": "What is the capital of France?", "temperature": 0, "request_output_len": 24},
        {"instance_id": 7, "sequence_start": True, "prompt": "My name is Ada.", "stream": True},
        {"instance_id": 7, "sequence_start": False, "sequence_end": True, "prompt": "", "request_output_len": 0},
    ),
    GenerateReply: ({"text": "Hello, Ada!", "tokens": 4, "finish_reason": "stop", "usage": TURN_USAGE},),
    ChatRequest: (
        {"model": MODEL, "messages": ASKED, "max_tokens": 24},
        {"model": MODEL, "messages": "My name is Ada.", "session_id": 7, "stream": True},
        {
            "model": MODEL,
            "messages": "What is the weather in Paris?",
            "tools": [{"type": "function", "function": WEATHER}],
            "tool_choice": "required",
        },
        {
            "model": MODEL,
            "messages": ASKED,
            "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
        },
    ),
    ChatReply: (
        _chat("chat.completion", {"message": ANSWER, "logprobs": None, "finish_reason": "stop"}, usage=USAGE),
        _chat(
            "chat.completion",
            {
                "message": {**ANSWER, "content": None, "tool_calls": [CALLED]},
                "logprobs": None,
                "finish_reason": "tool_calls",
            },
            usage=USAGE,
        ),
    ),
    ChatChunk: (
        _chat("chat.completion.chunk", {"delta": {"content": "Hello"}, "logprobs": None, "finish_reason": None}),
        _chat(
            "chat.completion.chunk",
            {"delta": {"tool_calls": [{"index": 0, **CALL}]}, "logprobs": None, "finish_reason": None},
        ),
    ),
    CompletionRequest: (
        {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 24},
        {"model": MODEL, "prompt": [[504, 2365], [198]], "max_tokens": 1, "logprobs": 5},
        {"model": MODEL, "prompt": "The sky is", "guided_choice": ["red", "green", "blue"]},
    ),
    CompletionReply: (_completion({"text": ", there was", "finish_reason": "length"}, usage=USAGE),),
    CompletionChunk: (_completion({"text": ", there", "finish_reason": None}),),
    MessagesRequest: (
        {"model": MODEL, "max_tokens": 64, "system": "Be brief.", "messages": ASKED[1:]},
        {"model": MODEL, "max_tokens": 64, "messages": ASKED[1:], "stream": True},
        {
            "model": MODEL,
            "max_tokens": 64,
            "messages": ASKED[1:],
            "output_config": {"format": {"type": "json_schema", "schema": CITY}},
        },
        {
            "model": MODEL,
            "max_tokens": 64,
            "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
            "tools": [{"name": "get_weather", "description": "The weather in a city.", "input_schema": CITY}],
            "tool_choice": {"type": "any"},
        },
    ),
    MessageReply: (
        {
            "id": "msg_1f2e3d",
            "type": "message",
            "role": "assistant",
            "model": MODEL,
            "content": [
                {"type": "tool_use", "id": "toolu_1f2e3d", "name": "get_weather", "input": {"city": "Paris"}},
            ],
            "stop_reason": "tool_use",
            "stop_sequence": None,
            "usage": MESSAGE_USAGE,
        },
        {
            "id": "msg_1f2e3d",
            "type": "message",
            "role": "assistant",
            "model": MODEL,
            "content": [{"type": "text", "text": "Hello, how are you?"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": MESSAGE_USAGE,
        },
    ),
    MessageEvent: (
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "input_json_delta", "partial_json": '{"city": "Par'},
        },
    ),
    CountTokensRequest: ({"model": MODEL, "system": "Be brief.", "messages": ASKED[1:]},),
    CountTokensReply: ({"input_tokens": 31},),
    InteractiveRequest: (
        {"prompt": "My name is Ada.", "session_id": 7, "interactive_mode": True, "request_output_len": 24},
        {"prompt": "", "session_id": 7, "request_output_len": 0},
    ),
    InteractiveReply: (
        {"text": "Hello, Ada!", "tokens": 4, "input_tokens": 13, "history_tokens": 18, "finish_reason": "stop"},
    ),
}
