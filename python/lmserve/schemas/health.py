"""`GET /health`."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class HealthFault(Struct, frozen=True):
    """What does not work while everything else does."""

    code: str
    message: str


class HealthReply(Struct, frozen=True):
    """The model is loaded and takes requests. `degraded`: `faults` say what is refused, or not kept, meanwhile."""

    status: Literal["ok", "degraded"] = "ok"
    faults: list[HealthFault] | UnsetType = UNSET
