"""Tracks which part of a model is being read, so that an error can name the part that takes too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

from lmserve.errors import LmserveError

T = TypeVar("T")

# Seconds for each part but the weights, whose size has no limit. The largest tokenizer that is allowed takes seconds.
MAX_SECONDS: Final = 120.0
LOOK: Final = 0.1  # seconds between two looks at what is being read


class Loading:
    """One model's loading, which another thread may look at."""

    def __init__(self) -> None:
        self.part: tuple[str, float] | None = None  # what is being read, and since when

    def check(self) -> None:
        """Raises LmserveError for a part that takes longer than MAX_SECONDS."""
        part = self.part
        if part is not None and time.monotonic() - part[1] > MAX_SECONDS:
            message = f"{part[0]} must be read within {MAX_SECONDS:g} s, but this takes longer"
            raise LmserveError.invalid("model", message, "invalid_checkpoint")


_current: ContextVar[Loading | None] = ContextVar("loading", default=None)


@contextmanager
def reading(part: str) -> Iterator[None]:
    """Within this, `part` is read, and has MAX_SECONDS where somebody looks."""
    loading = _current.get()
    if loading is None:
        yield
        return
    outer, loading.part = loading.part, (part, time.monotonic())
    try:
        yield
    finally:
        loading.part = outer


def begin(work: Callable[[], T]) -> tuple[Loading, Future[T]]:
    """Start `work` on a thread of its own. The process ends without waiting for it."""
    loading, done = Loading(), Future[T]()

    def run() -> None:
        _current.set(loading)
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the waiting thread
            done.set_exception(error)

    threading.Thread(target=run, name="load-model", daemon=True).start()
    return loading, done


def load(work: Callable[[], T]) -> T:
    """What `work` returns. Signals are obeyed meanwhile, whatever `work` waits for.

    Raises what `work` raises, and LmserveError for a part that takes too long.
    """
    loading, done = begin(work)
    while not wait((done,), LOOK).done:
        loading.check()
    return done.result()
