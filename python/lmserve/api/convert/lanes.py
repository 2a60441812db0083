"""Finds the lane of a request that sends its whole conversation, by the headers of agents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Final

import msgspec
from litestar.connection import ASGIConnection

from lmserve.api.convert.unsupported import Ignored
from lmserve.schemas.chat import ChatMessage

# Of Claude Code, Qwen Code beside some providers, Codex (its older ones with an underscore), and OpenCode.
HEADERS: Final = (
    "x-claude-code-session-id",
    "x-qwen-code-session-id",
    "session-id",
    "session_id",
    "x-session-id",
    "x-session-affinity",
)
# Agents that name their conversations nowhere, by the beginning of their user-agent: Qwen Code.
NAMELESS: Final = ("QwenCode/",)
CACHE_KEY: Final = "prompt_cache_key"
MAX_BYTES: Final = 256  # as in src/request.rs


def lane_of(
    request: ASGIConnection[Any, Any, Any, Any],
    ignored: Ignored,
    cache_key: str | None = None,
    messages: str | Sequence[ChatMessage] = (),
    *,
    enabled: bool,
) -> str | None:
    """The lane that the request names; None: none, or one that cannot be followed.

    `cache_key`: of the body; where it cannot be followed, it is added to `ignored`. `messages`: their beginning names
    the lane of an agent that does not. `enabled`: lanes are kept at all.
    """
    if enabled:
        named = (request.headers.get(header, "") for header in HEADERS)
        by_header = next(filter(_is_name, named), None)
        if by_header is not None:
            return by_header
    if cache_key and enabled and _is_name(cache_key):
        return cache_key
    if cache_key:
        ignored.add(CACHE_KEY)
    if enabled and request.headers.get("user-agent", "").startswith(NAMELESS) and not isinstance(messages, str):
        beginning = list(takewhile(lambda message: message.role != "assistant", messages))
        return hashlib.sha256(msgspec.json.encode(beginning)).hexdigest()
    return None


def _is_name(name: str) -> bool:
    return 1 <= len(name.encode(errors="replace")) <= MAX_BYTES
