"""Examples in the OpenAPI document. Tests check each against its schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from lmserve.api.http.errors import error_body
from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import (
    CountTokensReply,
    CountTokensRequest,
    MessageErrorReply,
    MessageEvent,
    MessageReply,
    MessagesRequest,
)
from lmserve.schemas.batches import BatchList, BatchReply, CreateBatch
from lmserve.schemas.chat import ChatChunk, ChatReply, ChatRequest
from lmserve.schemas.cohere import EmbedReply, EmbedRequest
from lmserve.schemas.compaction import CompactReply, CompactRequest, InputTokensReply, InputTokensRequest
from lmserve.schemas.completions import CompletionChunk, CompletionReply, CompletionRequest
from lmserve.schemas.conversations import (
    ConversationDeleted,
    ConversationReply,
    CreateConversation,
    CreateItems,
    UpdateConversation,
)
from lmserve.schemas.embeddings import EmbeddingsReply, EmbeddingsRequest
from lmserve.schemas.errors import ErrorReply, GenerateErrorReply
from lmserve.schemas.files import FileDeleted, FileList, FileReply
from lmserve.schemas.generate import GenerateReply, GenerateRequest
from lmserve.schemas.health import HealthReply
from lmserve.schemas.interactive import InteractiveReply, InteractiveRequest
from lmserve.schemas.models import ModelCard, ModelList
from lmserve.schemas.responses import (
    ItemList,
    ResponseDeleted,
    ResponseEvent,
    ResponseReply,
    ResponsesRequest,
    StoredMessage,
)
from lmserve.schemas.retention import Retention
from lmserve.schemas.scoring import (
    ClassifyReply,
    ClassifyRequest,
    RerankReply,
    RerankRequest,
    ScoreReply,
    ScoreRequest,
)
from lmserve.schemas.server import PropsReply, VersionReply
from lmserve.schemas.session_state import SessionCompletions, SessionExport
from lmserve.schemas.sessions import (
    Appended,
    AppendRequest,
    Cancelled,
    Deleted,
    ForkRequest,
    RewindRequest,
    SessionCard,
    SessionList,
    Transcript,
    TurnRequest,
)
from lmserve.schemas.tei import AnyRerankRequest, InputsRequest, RankedText
from lmserve.schemas.tokenize import (
    DetokenizeReply,
    DetokenizeRequest,
    EncodeReply,
    EncodeRequest,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfoReply,
)
from lmserve.schemas.usage import UsageReply

MODEL: Final = "SmolLM2-135M-Instruct"
CREATED: Final = 1767225600
RESPONSE_ID: Final = "resp_0123456789abcdef"
CONVERSATION_ID: Final = "conv_0123456789abcdef0123456789abcdef"
FILE_ID: Final = "file-0123456789abcdef0123456789abcdef"
FILE: Final = {
    "id": FILE_ID,
    "object": "file",
    "bytes": 217,
    "created_at": CREATED,
    "filename": "questions.jsonl",
    "purpose": "batch",
    "status": "processed",
}
BATCH: Final = {
    "id": "batch_0123456789abcdef0123456789abcdef",
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "errors": None,
    "input_file_id": FILE_ID,
    "completion_window": "24h",
    "status": "in_progress",
    "output_file_id": None,
    "error_file_id": None,
    "created_at": CREATED,
    "in_progress_at": CREATED,
    "expires_at": CREATED + 86400,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"completed": 1, "failed": 0, "total": 2},
    "metadata": {},
}
STORED_MESSAGE: Final = {
    "type": "message",
    "id": "msg_0123456789abcdef_0",
    "role": "user",
    "status": "completed",
    "content": [{"type": "input_text", "text": "My name is Ada."}],
}
ASKED: Final = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
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
TURN_USAGE: Final = {"prompt_tokens": 31, "history_tokens": 18, "cached_tokens": 16, "completion_tokens": 4}
SESSION: Final = {
    "id": 7,
    "object": "session",
    "turns": 1,
    "tokens": 31,
    "busy": False,
    "read_only": False,
    "created": CREATED,
    "age": 12.5,
    "idle": 4.25,
    "held": 0,
    "usage": {
        "prompt_tokens": 18,
        "cached_tokens": 0,
        "computed_tokens": 18,
        "generated_tokens": 14,
        "seconds": 0.62,
    },
}
FINGERPRINT: Final = "6f1ed002ab5595859014ebf0951522d9c0e7c2a4f2f3d3b5a7f9a1c3e5d7b9f1"
EXPORT: Final = {
    "id": 7,
    "object": "session.export",
    "version": 1,
    "model": MODEL,
    "fingerprint": FINGERPRINT,
    "created": CREATED,
    "seed": "3",
    "system_tokens": 0,
    "turns": [{"input_tokens": 1, "output_tokens": 1, "open": True, "logprobs": "AACAvg=="}],
    "tokens": "AQAAAAIAAAA=",
    "checksum": "d7a8fbb307d7809469ca9abcb0082e4f8d5651e46d3cdb762d02d0bf37c9e592",
}
CARD: Final = {
    "id": MODEL,
    "object": "model",
    "created": CREATED,
    "owned_by": "lmserve",
    "root": MODEL,
    "parent": None,
    "permission": [
        {
            "id": f"modelperm-{MODEL}",
            "object": "model_permission",
            "created": CREATED,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": True,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
    ],
    "max_model_len": 8192,
    "default_sampling_params": {"temperature": 0.2, "top_p": 0.9, "max_tokens": 512},
}


def _chat(kind: str, choice: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    head = {"id": "chatcmpl-1f2e3d", "object": kind, "created": CREATED, "model": MODEL}
    return {**head, "choices": [{"index": 0, **choice}], **more}


def _completion(choice: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    head = {"id": "cmpl-1f2e3d", "object": "text_completion", "created": CREATED, "model": MODEL}
    return {**head, "choices": [{"index": 0, "logprobs": None, **choice}], **more}


ANSWER: Final = {"role": "assistant", "content": "Hello, how are you?", "refusal": None}
CITY: Final = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 30}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Final = {"name": "get_weather", "description": "The weather in a city.", "parameters": CITY}
CALL: Final = {"id": "call_1f2e3d", "type": "function", "function": {"name": "get_weather"}}
CALLED: Final = {**CALL, "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}

EXAMPLES: Final[Mapping[type[Struct], tuple[Any, ...]]] = {
    GenerateRequest: (
        {"prompt": "What is the capital of France?", "temperature": 0, "request_output_len": 24},
        {"instance_id": 7, "sequence_start": True, "prompt": "My name is Ada.", "stream": True},
        {"instance_id": 7, "sequence_start": False, "sequence_end": True, "prompt": "", "request_output_len": 0},
    ),
    TurnRequest: (
        {"prompt": "My name is Ada.", "create": True, "max_tokens": 24},
        {"messages": [{"role": "user", "content": "Who am I?"}], "stream": True},
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
    EmbeddingsRequest: ({"model": MODEL, "input": ["Hello world!", "Good morning."]},),
    EmbeddingsReply: (
        {
            "object": "list",
            "data": [{"object": "embedding", "embedding": [0.6, -0.8], "index": 0}],
            "model": MODEL,
            "usage": {"prompt_tokens": 3, "total_tokens": 3},
        },
    ),
    EmbedRequest: (
        {"model": MODEL, "texts": ["Hello world!"], "input_type": "search_document", "embedding_types": ["int8"]},
    ),
    EmbedReply: (
        {
            "id": "embed-1f2e3d",
            "embeddings": {"int8": [[95, -127]]},
            "texts": ["Hello world!"],
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": 3},
                "tokens": {"input_tokens": 3, "output_tokens": 0},
            },
            "response_type": "embeddings_by_type",
        },
    ),
    InputsRequest: ({"inputs": ["Hello world!", "Good morning."], "truncate": True},),
    ScoreRequest: ({"model": MODEL, "text_1": "A cat.", "text_2": ["A kitten.", "A spanner."]},),
    ScoreReply: (
        {
            "id": "score-1f2e3d",
            "object": "list",
            "created": CREATED,
            "model": MODEL,
            "data": [
                {"index": 0, "object": "score", "score": 0.84},
                {"index": 1, "object": "score", "score": 0.11},
            ],
            "usage": {"prompt_tokens": 10, "total_tokens": 10},
        },
    ),
    RerankRequest: (
        {"model": MODEL, "query": "What has whiskers?", "documents": ["A spanner.", "A cat."], "top_n": 1},
        {"model": MODEL, "query": "What has whiskers?", "documents": [{"text": "A cat."}], "return_documents": False},
    ),
    RerankReply: (
        {
            "id": "rerank-1f2e3d",
            "model": MODEL,
            "usage": {"total_tokens": 12, "prompt_tokens": 12},
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"search_units": 1},
                "tokens": {"input_tokens": 12, "output_tokens": 0},
            },
            "results": [{"index": 1, "document": {"text": "A cat."}, "relevance_score": 0.62}],
        },
    ),
    AnyRerankRequest: (
        {"query": "What has whiskers?", "texts": ["A spanner.", "A cat."], "raw_scores": True},
        {"query": "What has whiskers?", "documents": ["A spanner.", "A cat."], "top_n": 1},
    ),
    RankedText: ({"index": 1, "score": 0.62}, {"index": 1, "text": "A cat.", "score": 0.62}),
    ClassifyRequest: ({"model": MODEL, "input": ["What a fine day!"]},),
    ClassifyReply: (
        {
            "id": "classify-1f2e3d",
            "object": "list",
            "created": CREATED,
            "model": MODEL,
            "data": [{"index": 0, "label": "joy", "probs": [0.9, 0.1], "num_classes": 2}],
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
        },
    ),
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
    FileReply: (FILE,),
    FileList: ({"object": "list", "data": [FILE], "first_id": FILE_ID, "last_id": FILE_ID, "has_more": False},),
    FileDeleted: ({"id": FILE_ID, "object": "file", "deleted": True},),
    CreateBatch: ({"input_file_id": FILE_ID, "endpoint": "/v1/chat/completions", "completion_window": "24h"},),
    BatchReply: (BATCH,),
    BatchList: (
        {"object": "list", "data": [BATCH], "first_id": BATCH["id"], "last_id": BATCH["id"], "has_more": False},
    ),
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
    InteractiveRequest: (
        {"prompt": "My name is Ada.", "session_id": 7, "interactive_mode": True, "request_output_len": 24},
        {"prompt": "", "session_id": 7, "request_output_len": 0},
    ),
    InteractiveReply: (
        {"text": "Hello, Ada!", "tokens": 4, "input_tokens": 13, "history_tokens": 18, "finish_reason": "stop"},
    ),
    TokenizeRequest: (
        {"prompt": "Hello world!", "return_token_strs": True},
        {"messages": ASKED, "add_generation_prompt": True},
    ),
    TokenizeReply: (
        {"count": 3, "max_model_len": 8192, "tokens": [19556, 905, 17], "token_strs": ["Hello", " world", "!"]},
    ),
    DetokenizeRequest: ({"tokens": [72, 105]},),
    DetokenizeReply: ({"prompt": "Hello world!"},),
    TokenizerInfoReply: (
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": None,
            "model_max_length": 8192,
        },
    ),
    EncodeRequest: ({"input": ["Hello world!", "Hi"]},),
    EncodeReply: ({"input_ids": [[19556, 905, 17], [26843]], "length": [3, 1]},),
    SessionList: ({"object": "list", "data": [SESSION], "has_more": False, "last_id": 7},),
    SessionCard: ({**SESSION, "cached_tokens": 16},),
    Transcript: (
        {
            "id": 7,
            "object": "session.transcript",
            "turns": [{"input": "<|im_start|>user\nMy name is Ada.<|im_end|>\n", "output": "Hello, Ada!<|im_end|>"}],
        },
    ),
    Retention: ({"hold": "10m"}, {"drop": True}),
    SessionExport: (EXPORT,),
    SessionCompletions: (
        {
            "id": 7,
            "object": "session.completions",
            "model": MODEL,
            "fingerprint": FINGERPRINT,
            "data": [
                {
                    "turn": 1,
                    "context_tokens": 0,
                    "input_ids": [1, 4093, 198],
                    "output_ids": [19556, 28],
                    "logprobs": [-0.25, -1.5],
                    "loss_mask": [0, 0, 0, 1, 1],
                }
            ],
            "has_more": False,
        },
    ),
    ForkRequest: ({"session_id": 8}, {"session_id": 8, "turns": 1}),
    RewindRequest: ({"turns": 1},),
    AppendRequest: ({"prompt": "My name is Ada."}, {"prompt": ASKED, "create": True}),
    Appended: ({"id": 7, "object": "session.append", "usage": {**TURN_USAGE, "completion_tokens": 0}},),
    Cancelled: ({"id": 7, "object": "session.cancel", "cancelled": True},),
    Deleted: ({"id": 7, "object": "session.deleted", "deleted": True},),
    ModelList: ({"object": "list", "data": [CARD]},),
    ModelCard: (CARD,),
    UsageReply: (
        {
            "object": "usage",
            "key": "ada",
            "since": CREATED,
            "requests": 12,
            "prompt_tokens": 4096,
            "cached_tokens": 2048,
            "completion_tokens": 640,
            "in_flight": 1,
            "waiting": 0,
            "limits": {
                "weight": 1,
                "max_in_flight": 8,
                "tokens_per_minute": None,
                "max_sessions": None,
                "max_priority": None,
            },
            "remaining": {"limit_requests": 8, "remaining_requests": 7},
        },
    ),
    HealthReply: (
        {"status": "ok"},
        {
            "status": "degraded",
            "faults": [
                {
                    "code": "storage_full",
                    "message": "the session log has no room on its disk: No space left on device (os error 28)",
                }
            ],
        },
    ),
    VersionReply: ({"version": "0.1.0"},),
    PropsReply: (
        {
            "default_generation_settings": {"n_ctx": 8192},
            "model_alias": MODEL,
            "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
            "modalities": {"vision": False, "audio": False},
            "build_info": "lmserve 0.1.0",
        },
    ),
}

FAILURES: Final[Mapping[int, LmserveError]] = {
    400: LmserveError.invalid("temperature", "temperature: expected a number <= 2.0, but 9 was given"),
    401: LmserveError.new(401, "invalid_api_key", "this server does not know the given API key"),
    404: LmserveError.new(
        404, "model_not_found", f"the model 'x' is not served; the served models are: {MODEL}", param="model"
    ),
    408: LmserveError.new(408, "request_timeout", "the body must arrive within 60 seconds, but only 12 bytes have"),
    409: LmserveError.new(
        409, "session_busy", "session 7 is already running a turn; a session runs one turn at a time", retry_after=1
    ),
    413: LmserveError.new(
        413,
        "body_too_large",
        "the body may have 33554432 bytes, but 33554433 were given",
        max_bytes=33554432,
    ),
    429: LmserveError.new(
        429,
        "queue_full",
        "1088 answers are running or waiting, the limit is 1088, and 1 more were requested",
        retry_after=1,
    ),
    503: LmserveError.new(503, "loading", f"the model {MODEL} is being loaded", retry_after=2),
    507: LmserveError.new(
        507,
        "storage_full",
        "the session log has no room on its disk: No space left on device; the session is unchanged",
        retry_after=5,
    ),
}


# Where each shape of error comes from.
ERROR_REPLIES: Final[Mapping[type[Struct], str]] = {
    ErrorReply: "/v1/chat/completions",
    GenerateErrorReply: "/generate",
    MessageErrorReply: "/v1/messages",
}


def failure(status: int, model: type[Struct]) -> dict[str, Any]:
    """The body of an error reply with this status; `model` is one of ERROR_REPLIES."""
    return error_body(FAILURES[status], ERROR_REPLIES[model])


Form = Literal["events", "named events", "frames", "lines"]

STREAMS: Final[Mapping[Form, str]] = {
    "events": "text/event-stream",
    "named events": "text/event-stream",
    "frames": "application/octet-stream",
    # LMDeploy called its lines server-sent events.
    "lines": "text/event-stream",
}


def stream_of(frame: type[Struct], form: Form) -> str:
    """A stream of one frame."""
    example = EXAMPLES[frame][0]
    text = msgspec.json.encode(example).decode()
    match form:
        case "events":
            return f"data: {text}\n\ndata: [DONE]\n\n"
        case "named events":
            return f"event: {example['type']}\ndata: {text}\n\n"
        case "frames":
            return f"{text}\0"
        case "lines":
            return f"{text}\n"
