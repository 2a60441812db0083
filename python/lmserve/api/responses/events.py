"""Keeps the events of a background response, so that clients can read them, also more than once."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Self

from lmserve.errors import LmserveError

MAX_EVENT_BYTES: Final = 33_554_432  # of one response
EVENT_END: Final = b"\n\n"


class ResponseEvents:
    """Server-sent events in order, numbered from 0, for any number of readers.

    It keeps the newest MAX_EVENT_BYTES of them.
    """

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self.size = 0  # bytes
        self.count = 0  # events so far
        self.ended = False
        self.refusal: LmserveError | None = None  # why there never was an event
        self._max_bytes = max_bytes
        self._chunks: deque[tuple[int, bytes]] = deque()  # each with the number of its first event
        self._news = asyncio.Event()

    def add(self, events: bytes) -> None:
        """Whole events, as the core hands them out."""
        if not events:
            return
        self._chunks.append((self.count, events))
        self.count += events.count(EVENT_END)
        self.size += len(events)
        while self.size > self._max_bytes and len(self._chunks) > 1:
            _, oldest = self._chunks.popleft()
            self.size -= len(oldest)
        self.wake()

    def end(self, refusal: LmserveError | None = None) -> None:
        """No event comes any more. `refusal`: the request was refused before its first one."""
        self.ended, self.refusal = True, refusal
        self.wake()

    def forget(self) -> None:
        """Give up the events; who reads them gets no more."""
        self._chunks.clear()
        self.size = 0
        self.end(self.refusal)

    def wake(self) -> None:
        """Let every reader look again."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def news(self) -> None:
        """Wait until something was added, or `wake` was called."""
        await self._news.wait()

    @property
    def first(self) -> int:
        """The number of the first event that is kept."""
        return self._chunks[0][0] if self._chunks else self.count

    def since(self, number: int) -> bytes:
        """The events from `number` on. Those before `first` are gone."""
        parts = []
        for at, chunk in reversed(self._chunks):
            if at < number:
                parts.append(EVENT_END.join(chunk.split(EVENT_END)[number - at :]))
                break
            parts.append(chunk)
            if at == number:
                break
        return b"".join(reversed(parts))

    def follow(self, starting_after: int = -1) -> EventReader:
        """The events after one. Raises LmserveError (400) if some of them are no longer kept."""
        if starting_after + 1 < self.first:
            message = (
                f"the server no longer has the events up to {self.first - 1}, but those after {starting_after} "
                "were requested"
            )
            raise LmserveError.invalid("starting_after", message, "events_not_kept")
        return EventReader(self, starting_after + 1)


class EventReader:
    """An `EventStream` of recorded events. One that leaves stops nothing."""

    def __init__(self, events: ResponseEvents, begin: int) -> None:
        self._events = events
        self._next = begin
        self._left = False

    @property
    def aborted(self) -> bool:
        """Whether `abort` came before the end."""
        return self._left and not self._at_end

    @property
    def _at_end(self) -> bool:
        return self._events.ended and self._next >= self._events.count

    async def opened(self) -> None:
        """Wait for the first event. Raises the LmserveError of a request that was refused."""
        while not (self._left or self._events.count or self._events.ended):
            await self._events.news()
        if self._events.refusal is not None:
            raise self._events.refusal

    def chunks(self) -> Self:
        """The events as they come, as an async iterator."""
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._left:
            # A reader that is slower than the model for very long has lost events: its stream ends.
            if self._events.first <= self._next < self._events.count:
                chunk = self._events.since(self._next)
                self._next = self._events.count
                return chunk
            if self._events.ended or self._next < self._events.first:
                break
            await self._events.news()
        raise StopAsyncIteration

    def abort(self) -> None:
        """The reader leaves. Idempotent."""
        self._left = True
        self._events.wake()
