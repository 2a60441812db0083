"""Parameters that several routes hand to the core."""

from __future__ import annotations

from itertools import count
from typing import Final, TypeVar

from lmserve.engine.submission import OnDisconnect, OnOverflow, SessionRef
from lmserve.schemas.bounds import ANONYMOUS

T = TypeVar("T")

_U64: Final = 2**64
# Ids that no client can give.
_throwaway_ids = count(ANONYMOUS - 1, -1)


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
    on_overflow: OnOverflow,
) -> SessionRef | None:
    """The turn's session; None for an anonymous one."""
    if session_id == ANONYMOUS:
        if on_overflow == "error":
            return None
        # The policy is the session's, so this turn gets one that ends with it.
        return SessionRef(id=next(_throwaway_ids), start=True, end=True, on_overflow=on_overflow)
    return SessionRef(
        id=session_id, start=start, create=create, end=end, on_disconnect=on_disconnect, on_overflow=on_overflow
    )
