"""What the core says of sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct


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
