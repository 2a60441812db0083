"""Examples of sessions and of what keys use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from lmserve.api.http.examples.values import ASKED, CREATED, MODEL, TURN_USAGE
from lmserve.schemas.retention import Retention
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
from lmserve.schemas.usage import UsageReply

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

EXAMPLES: Final[Mapping[type[Struct], tuple[Any, ...]]] = {
    TurnRequest: (
        {"prompt": "My name is Ada.", "create": True, "max_tokens": 24},
        {"messages": [{"role": "user", "content": "Who am I?"}], "stream": True},
    ),
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
}
