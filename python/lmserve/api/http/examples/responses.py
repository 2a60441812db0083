"""Examples of OpenAI's responses and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from lmserve.api.http.examples.values import CITY, CREATED, MODEL, WEATHER
from lmserve.schemas.compaction import CompactReply, CompactRequest, InputTokensReply, InputTokensRequest
from lmserve.schemas.conversations import (
    ConversationDeleted,
    ConversationReply,
    CreateConversation,
    CreateItems,
    UpdateConversation,
)
from lmserve.schemas.response_reply import ItemList, ResponseDeleted, ResponseEvent, ResponseReply, StoredMessage
from lmserve.schemas.responses import ResponsesRequest

RESPONSE_ID: Final = "resp_0123456789abcdef"
CONVERSATION_ID: Final = "conv_0123456789abcdef0123456789abcdef"
STORED_MESSAGE: Final = {
    "type": "message",
    "id": "msg_0123456789abcdef_0",
    "role": "user",
    "status": "completed",
    "content": [{"type": "input_text", "text": "My name is Ada."}],
}

EXAMPLES: Final[Mapping[type[Struct], tuple[Any, ...]]] = {
    ResponsesRequest: (
        {"model": MODEL, "input": "My name is Ada.", "max_output_tokens": 24},
        {"model": MODEL, "input": "What is my name?", "previous_response_id": RESPONSE_ID, "stream": True},
        {
            "model": MODEL,
            "input": "Name a city.",
            "text": {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}},
        },
        {
            "model": MODEL,
            "input": "What is the weather in Paris?",
            "tools": [{"type": "function", **WEATHER}],
            "tool_choice": {"type": "function", "name": "get_weather"},
        },
        {
            "model": MODEL,
            "input": [{"type": "function_call_output", "call_id": "call_1f2e3d", "output": "Sunny."}],
            "previous_response_id": RESPONSE_ID,
        },
    ),
    ResponseReply: (
        {
            "id": RESPONSE_ID,
            "object": "response",
            "created_at": CREATED,
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "model": MODEL,
            "output": [
                {
                    "type": "message",
                    "id": "msg_0123456789abcdef_out0",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "Hello, Ada!", "annotations": [], "logprobs": []}],
                }
            ],
            "usage": {
                "input_tokens": 31,
                "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0},
                "output_tokens": 4,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 35,
            },
            "background": False,
            "conversation": None,
            "instructions": None,
            "max_output_tokens": 24,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": True,
            "temperature": 1.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": 0,
            "top_p": 1.0,
            "truncation": "disabled",
            "user": None,
        },
    ),
    ResponseEvent: (
        {
            "type": "response.output_text.delta",
            "sequence_number": 4,
            "item_id": "msg_0123456789abcdef_out0",
            "output_index": 0,
            "content_index": 0,
            "delta": "Hello",
            "logprobs": [],
        },
        {
            "type": "response.function_call_arguments.delta",
            "sequence_number": 4,
            "item_id": "fc_0123456789abcdef_out0",
            "output_index": 0,
            "delta": '{"city": "Par',
        },
    ),
    CreateConversation: (
        {"items": [{"role": "user", "content": "My name is Ada."}], "metadata": {"topic": "names"}},
        {},
    ),
    UpdateConversation: ({"metadata": {"topic": "names"}},),
    ConversationReply: (
        {"id": CONVERSATION_ID, "object": "conversation", "created_at": CREATED, "metadata": {"topic": "names"}},
    ),
    ConversationDeleted: ({"id": CONVERSATION_ID, "object": "conversation.deleted", "deleted": True},),
    CreateItems: ({"items": [{"role": "user", "content": "I like tea."}]},),
    StoredMessage: (STORED_MESSAGE,),
    InputTokensRequest: ({"model": MODEL, "input": "My name is Ada.", "instructions": "Be brief."},),
    InputTokensReply: ({"object": "response.input_tokens", "input_tokens": 31},),
    CompactRequest: (
        {
            "model": MODEL,
            "input": [
                {"role": "user", "content": "My name is Ada."},
                {"role": "assistant", "content": "Hello, Ada!"},
            ],
        },
        {"previous_response_id": RESPONSE_ID},
    ),
    CompactReply: (
        {
            "id": RESPONSE_ID,
            "object": "response.compaction",
            "created_at": CREATED,
            "output": [
                {
                    "type": "message",
                    "id": "msg_0123456789abcdef_0",
                    "role": "user",
                    "status": "completed",
                    "content": [{"type": "input_text", "text": "My name is Ada."}],
                },
                {
                    "type": "compaction",
                    "id": "cmp_0123456789abcdef",
                    "encrypted_content": "lmserve1.VGhlIHVzZXIgaXMgQWRhLg==",
                },
            ],
            "usage": {
                "input_tokens": 90,
                "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0},
                "output_tokens": 6,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 96,
            },
        },
    ),
    ResponseDeleted: ({"id": RESPONSE_ID, "object": "response", "deleted": True},),
    ItemList: (
        {
            "object": "list",
            "data": [
                {
                    "id": "msg_0123456789abcdef_0",
                    "type": "message",
                    "role": "user",
                    "status": "completed",
                    "content": [{"type": "input_text", "text": "My name is Ada."}],
                }
            ],
            "first_id": "msg_0123456789abcdef_0",
            "last_id": "msg_0123456789abcdef_0",
            "has_more": False,
        },
    ),
}
