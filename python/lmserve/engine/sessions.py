"""What the core says of sessions, and what it must know to keep them for good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

Fsync = Literal["always", "interval", "never"]


class SessionLog(Struct, frozen=True, kw_only=True):
    """Where sessions are written down, so that they outlive the process."""

    folder: str  # no two servers share it
    fsync: Fsync = "interval"  # before a turn's end is told, once a second, or when the system likes
    fingerprint: bytes  # 32 bytes that name model, tokenizer and chat template
    model: str  # for messages
    tenants: dict[int, bytes]  # each tenant's 32 bytes that name it for good; no session of another is written


class SessionInfo(Struct, frozen=True, kw_only=True):
    """A session without its tokens. Times are in milliseconds since 1970."""

    id: int
    turns: int  # committed
    tokens: int  # of the committed turns
    busy: bool  # a turn runs
    created_ms: int
    used_ms: int
    cached_tokens: int | None = None  # of `tokens`, those that the next turn need not compute; None: not asked for


class TranscriptTurn(Struct, frozen=True):
    """One committed turn as the model saw and gave it: special tokens are written out."""

    input: str
    output: str
    input_ids: list[int]
    output_ids: list[int]


def session_info_of(values: Mapping[str, Any]) -> SessionInfo:
    return msgspec.convert(values, SessionInfo)
