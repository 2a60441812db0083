"""The one exception of lmserve. The Rust core defines it; this module maps it to Python, `api.http.errors` to HTTP."""

from __future__ import annotations

import json
from typing import Any, Self


class LmserveError(Exception):
    """A failure that says what, the limit, and what was given.

    `status` is the HTTP status, `error` the object under `error` in OpenAI's shape:
    `{"message", "type", "param", "code", ...}`; further keys are numbers that a client may act on.
    """

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.status = status
        self.error = error

    @classmethod
    def from_core(cls, status: int, error_json: str) -> Self:
        """Build from the core's JSON error object (called by `lmserve._core`)."""
        return cls(status, json.loads(error_json))

    @classmethod
    def new(
        cls,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        type_name: str | None = None,
        **details: Any,
    ) -> Self:
        """An error that is raised in Python; `type_name` defaults to the one that belongs to `status`."""
        kind = type_name or _TYPE_NAMES.get(status, "invalid_request_error" if status < 500 else "server_error")
        return cls(status, {"message": message, "type": kind, "param": param, "code": code, **details})

    @classmethod
    def invalid(cls, param: str | None, message: str, code: str = "invalid_value") -> Self:
        """400: the request can never succeed as it was sent."""
        return cls.new(400, code, message, param=param)

    @property
    def code(self) -> str:
        return str(self.error["code"])

    @property
    def retry_after(self) -> int | None:
        """Seconds after which a retry may succeed, where the core knows."""
        value = self.error.get("retry_after")
        return None if value is None else int(value)


# The same words as `Kind::type_name` in src/error.rs.
_TYPE_NAMES = {
    401: "authentication_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
