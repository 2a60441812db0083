"""Parameters of OpenAI's API that change the output and are not supported: refused, never ignored in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import CountTokensRequest, MessagesRequest, OutputConfig
from lmserve.schemas.chat import ChatMessage, ChatRequest
from lmserve.schemas.completions import CompletionRequest
from lmserve.schemas.responses import ResponsesRequest, TextConfig

# Values that ask for nothing. An SDK may send them unasked.
WITHOUT_EFFECT: Final[Mapping[str, tuple[Any, ...]]] = {
    "annotations": ([],),
    "context_management": ([], {"edits": []}),
    "function_call": ("none", "auto"),
    "functions": ([],),
    # LMDeploy's own client sends it.
    "kwargs": ({},),
    "mcp_servers": ([],),
    "modalities": (["text"],),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "verbosity": ("medium",),
}

REASONS: Final = {
    "suffix": "suffix asks for a text between prompt and suffix, which the served models do not write; leave it out",
}

UNSUPPORTED: Final[Mapping[type[Struct], tuple[str, ...]]] = {
    model: tuple(name for name, annotation in model.__annotations__.items() if annotation == "Unsupported")
    for model in (
        ChatRequest,
        ChatMessage,
        CompletionRequest,
        MessagesRequest,
        CountTokensRequest,
        OutputConfig,
        ResponsesRequest,
        TextConfig,
    )
}


def refuse_unsupported(struct: Struct, prefix: str = "") -> None:
    """Raises LmserveError (400) for the first unsupported parameter that would change the output."""
    for name in UNSUPPORTED[type(struct)]:
        value = getattr(struct, name)
        if isinstance(value, Raw) and not _is_without_effect(name, value):
            message = REASONS.get(name, f"{prefix}{name} is not supported by this server; leave it out")
            raise LmserveError.invalid(f"{prefix}{name}", message, "unsupported_parameter")


def _is_without_effect(name: str, raw: Raw) -> bool:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return value is None or value in WITHOUT_EFFECT.get(name, ())
