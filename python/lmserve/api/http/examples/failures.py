"""Examples of errors, in the shape of each API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from lmserve.api.http.errors import error_body
from lmserve.api.http.examples.values import MODEL
from lmserve.errors import LmserveError
from lmserve.schemas.anthropic import MessageErrorReply
from lmserve.schemas.errors import ErrorReply, GenerateErrorReply

FAILURES: Final[Mapping[int, LmserveError]] = {
    400: LmserveError.invalid("temperature", "temperature: expected a number <= 2.0, but 9 was given"),
    401: LmserveError.new(401, "invalid_api_key", "this server does not know the given API key"),
    403: LmserveError.new(
        403,
        "adapter_updates_off",
        "this server loads and unloads no adapters on request; --lora-dir allows it for those of a folder",
    ),
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
