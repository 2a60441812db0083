"""`GET /health`."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class HealthFault(Struct, frozen=True):
    """A part of the server that does not work. All else does."""

    code: str
    message: str


class HealthReply(Struct, frozen=True):
    """The model is loaded and takes requests. With status `degraded`, `faults` says what is refused or not kept."""

    status: Literal["ok", "degraded"] = "ok"
    faults: list[HealthFault] | UnsetType = UNSET
