"""The one exception of lmserve: typed in the Rust core, mapped to Python here and to HTTP in `lmserve.app`."""

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

    @property
    def code(self) -> str:
        return str(self.error["code"])

    @property
    def retry_after(self) -> int | None:
        """Seconds after which a retry may succeed, where the core knows."""
        value = self.error.get("retry_after")
        return None if value is None else int(value)
