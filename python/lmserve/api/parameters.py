"""Parameters that several routes hand to the core."""

from __future__ import annotations

from typing import Final, TypeVar

from lmserve.engine.submission import OnDisconnect, SessionRef
from lmserve.schemas.bounds import ANONYMOUS

T = TypeVar("T")

_U64: Final = 2**64


def given_or(value: T | None, default: T) -> T:
    return default if value is None else value


def seed_bits(seed: int | None) -> int | None:
    """The seed as the unsigned number with the same 64 bits."""
    return None if seed is None else seed % _U64


def session_ref(
    session_id: int,
    *,
    start: bool,
    create: bool,
    end: bool,
    on_disconnect: OnDisconnect,
) -> SessionRef | None:
    """The turn's session; None for an anonymous one."""
    if session_id == ANONYMOUS:
        return None
    return SessionRef(id=session_id, start=start, create=create, end=end, on_disconnect=on_disconnect)
