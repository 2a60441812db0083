"""What the engine is told when the process that computes is not there, with the codes of `src/engine/executor.rs`."""

from __future__ import annotations

from typing import Final

from lmserve.errors import LmserveError

MEMORY_LOST: Final = "memory_lost"
WORKER_UNAVAILABLE: Final = "worker_unavailable"
RETRY_AFTER: Final = 2  # seconds


class PipeError(Exception):
    """The process at the other end is gone, or what it sends is no frame."""


class PipeEndedError(PipeError):
    """The process at the other end has closed the connection, or has ended."""


def memory_lost() -> LmserveError:
    """The process is a new one: whatever ran is computed again."""
    return LmserveError.new(503, MEMORY_LOST, "the process that computes the model was started again")


def unavailable(why: str) -> LmserveError:
    """All open requests fail with it."""
    message = f"the process that computes the model is down and is being started again: {why}"
    return LmserveError.new(503, WORKER_UNAVAILABLE, message, retry_after=RETRY_AFTER)
