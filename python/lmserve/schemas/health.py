"""`GET /health`."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class HealthReply(Struct, frozen=True):
    """The model is loaded and takes requests."""

    status: Literal["ok"] = "ok"
