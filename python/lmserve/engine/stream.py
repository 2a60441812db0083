"""One request's reply on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Self

from lmserve.engine.core import ENDED, WAITING, CoreStream
from lmserve.engine.sessions import SessionId
from lmserve.errors import LmserveError


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of a request: its tokens, and the seconds from its arrival to its first step and its first token."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt: not computed again
    completion_tokens: int = 0
    queued: float | None = None
    first_token: float | None = None


# The streams that were begun in this context, for the request log; None: they are not recorded.
begun: ContextVar[list[AsyncStream] | None] = ContextVar("begun", default=None)


class AsyncStream:
    """One request's reply. For one consumer: `opened`, then `chunks`; or `body` alone."""

    __slots__ = (
        "_aborted",
        "_begin",
        "_core",
        "_ended",
        "_followed",
        "_news",
        "_pending",
        "_state",
        "_waiter",
        "session",
    )

    def __init__(
        self,
        core: CoreStream | None,
        followed: dict[int, AsyncStream],
        session: SessionId | None,
        begin: Callable[[], Awaitable[CoreStream]] | None = None,
        ended: Callable[[bool], None] | None = None,
    ) -> None:
        """`session`: the one that the request belongs to. `begin`: hands it to the core, if that is still to be done.

        `ended`: is told once that such a request has ended, and whether by `abort`.
        """
        self._begin = begin
        self._ended = ended
        self.session = session
        self._core = core
        self._followed = followed  # the engine's streams: this one leaves them when it ends
        self._state = WAITING
        self._pending = b""  # polled, not yet handed out
        self._news = True  # the core may have something: poll before waiting
        self._waiter: asyncio.Future[None] | None = None
        self._aborted = False

    @property
    def aborted(self) -> bool:
        """Whether `abort` came before the reply's end."""
        return self._aborted

    @property
    def record(self) -> RequestRecord:
        """What became of the request so far; complete once the reply has ended."""
        return RequestRecord() if self._core is None else RequestRecord(*self._core.record())

    async def opened(self) -> None:
        """Wait until the core has accepted the request. Raises LmserveError if it refuses, or 499 after `abort`."""
        while self._state == WAITING:
            self._pending += await self._read()
        self._check_aborted()

    def chunks(self) -> Self:
        """The reply's bytes as they come, as an async iterator. It just ends after `abort`."""
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        chunk, self._pending = self._pending, b""
        while not chunk:
            if self._state == ENDED:
                raise StopAsyncIteration
            chunk = await self._read()
        return chunk

    async def body(self) -> bytes:
        """The whole reply. Raises LmserveError if the request fails, or 499 after `abort`."""
        parts = []
        while self._state != ENDED:
            parts.append(await self._read())
        self._check_aborted()
        return b"".join(parts)

    def abort(self) -> None:
        """Stop the request and wake the consumer. Does nothing after the reply's end. Idempotent."""
        if self._state == ENDED:
            return
        self._aborted = True
        if self._core is not None:
            self._core.abort()
        self._end()
        self.wake()

    async def _read(self) -> bytes:
        """What is new, perhaps nothing, once there may be news."""
        core = self._core or await self._start()
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._news = False
        if self._aborted:
            return b""
        try:
            state, data = core.poll()
        except LmserveError:
            self._end()
            raise
        if state == ENDED:
            self._end()
        self._state = state
        return data

    async def _start(self) -> CoreStream:
        begin, self._begin = self._begin, None
        assert begin is not None
        try:
            core = self._core = await begin()
        except LmserveError:
            self._ended = None
            self._end()
            raise
        if self._aborted:
            core.abort()
            self._end()
        else:
            self._followed[core.id] = self
        return core

    def _check_aborted(self) -> None:
        if self._aborted:
            raise LmserveError.new(499, "client_closed_request", "the client left before the reply's end")

    def wake(self) -> None:
        """Tell the consumer that the core may have something for it."""
        self._news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self) -> None:
        self._state = ENDED
        if self._core is None:
            return
        self._followed.pop(self._core.id, None)
        if self._ended is not None:
            ended, self._ended = self._ended, None
            ended(self._aborted)
