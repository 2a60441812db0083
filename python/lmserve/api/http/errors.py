"""The one mapping from exceptions to HTTP: OpenAI's error shape on every route, with the real status."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from litestar import Request, Response
from litestar.exceptions import (
    HTTPException,
    MethodNotAllowedException,
    NotFoundException,
    ValidationException,
)

from lmserve.api.http.body import empty_body
from lmserve.api.http.expected import expected, in_words
from lmserve.errors import LmserveError

CLIENT_LEFT: Final = "client_left"  # in a request's state
CLIENT_CLOSED_REQUEST: Final = 499  # nginx's status for a client that left; it is logged, never received
# Longest quotation of what was given, in characters.
MAX_QUOTE: Final = 80
LIMIT: Final = re.compile(r"` [<>o]")  # a number's, or of a length, in msgspec's words
BODY: Final = "data"  # Litestar's name for it, in every handler
# After these the rest of the body may still be on its way.
BODY_UNREAD: Final = (408, 413)

ANTHROPIC: Final = "/v1/messages"
# Anthropic's words for `error.type`.
ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

logger = logging.getLogger("lmserve.http")
access_logger = logging.getLogger("lmserve.access")


def respond_to_exception(request: Request[Any, Any, Any], exc: Exception) -> Response[bytes]:
    """The reply to a request that failed before its first byte."""
    error = _as_lmserve_error(request, exc)
    headers: dict[str, str] = {}
    if error.status == CLIENT_CLOSED_REQUEST:
        log_client_left(request.scope)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    headers |= rate_limit_headers(error.error)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in BODY_UNREAD:
        headers["Connection"] = "close"
    if isinstance(exc, MethodNotAllowedException) and exc.headers:
        headers["Allow"] = exc.headers["allow"]
    body = msgspec.json.encode(error_body(error, request.scope["path"]))
    return Response(body, status_code=error.status, headers=headers, media_type="application/json")


def error_body(error: LmserveError, path: str) -> dict[str, Any]:
    """The error in the shape that clients of this path read."""
    if path.startswith(ANTHROPIC):
        return {"type": "error", "error": error.error | {"type": _anthropic_type(error.status)}}
    if path == "/generate":
        return {"error": error.error, "object": "error", "message": str(error)}
    return {"error": error.error}


def _anthropic_type(status: int) -> str:
    return ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def rate_limit_headers(numbers: Mapping[str, Any]) -> dict[str, str]:
    """OpenAI's headers for what there is of the core's numbers; requests are those in flight, tokens a minute's."""
    headers = {
        f"x-ratelimit-{what}-{unit}": str(numbers[f"{what}_{unit}"])
        for unit in ("requests", "tokens")
        for what in ("limit", "remaining")
        if f"{what}_{unit}" in numbers
    }
    if "reset_tokens_ms" in numbers:
        headers["x-ratelimit-reset-tokens"] = _duration(numbers["reset_tokens_ms"])
    return headers


def _duration(milliseconds: int) -> str:
    """As OpenAI writes it: 250ms, 1.5s, 6m0s."""
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"


def log_client_left(scope: Any) -> None:
    """One line as in uvicorn's access log, with the status that no client sees."""
    host, port = scope.get("client") or ("-", 0)
    version = scope.get("http_version", "1.1")
    scope["state"][CLIENT_LEFT] = True
    access_logger.info('%s:%d - "%s %s HTTP/%s" 499', host, port, scope["method"], scope["path"], version)


def _as_lmserve_error(request: Request[Any, Any, Any], exc: Exception) -> LmserveError:
    if isinstance(exc, LmserveError):
        return exc
    place = f"{request.method} {request.scope['path']}"
    if isinstance(exc, NotFoundException):
        return LmserveError.new(404, "route_not_found", f"there is no route {place}; GET /docs lists all routes")
    if isinstance(exc, MethodNotAllowedException):
        allowed = (exc.headers or {}).get("allow", "")
        return LmserveError.new(405, "method_not_allowed", f"there is no {place}; the route's methods are: {allowed}")
    if isinstance(exc, ValidationException):
        return _of_parameter(request, exc)
    if isinstance(exc, HTTPException) and exc.status_code < 500:
        return LmserveError.new(exc.status_code, "invalid_request", exc.detail)
    logger.error("%s failed", place, exc_info=exc)
    return LmserveError.new(500, "internal_error", "the server failed; see its log for the reason")


def _of_parameter(request: Request[Any, Any, Any], exc: ValidationException) -> LmserveError:
    """400 for a parameter of the path or the query that its type refuses."""
    found: Any = next(iter(exc.extra or ()), None)
    if not isinstance(found, dict) or "key" not in found:
        return LmserveError.new(exc.status_code, "invalid_request", exc.detail)
    name = found["key"]
    if name == BODY:
        return empty_body()
    given = request.query_params.get(name, request.path_params.get(name))
    message = found["message"]
    if LIMIT.search(message):
        allowed = in_words(message).removeprefix("Expected ")
    else:
        parameter = request.route_handler.parsed_fn_signature.parameters[name]
        allowed = expected(parameter.annotation, (), None) or "another value"
    quoted = f"{str(given)[:MAX_QUOTE]!r}" if isinstance(given, str) else str(given)[:MAX_QUOTE]
    return LmserveError.invalid(name, f"{name}: expected {allowed}, but {quoted} was given")
