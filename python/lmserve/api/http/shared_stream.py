"""Merges several streams of completions into one, with interleaved events, one usage and one `[DONE]` at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Self

import msgspec

from lmserve.engine.stream import AsyncStream
from lmserve.schemas.chat import ChatUsage, PromptTokensDetails
from lmserve.schemas.completions import CompletionChunk

DONE: Final = b"data: [DONE]\n\n"
DATA: Final = b"data: "
ERROR: Final = b'data: {"error":'
EVENT_END: Final = b"\n\n"

# Pieces of all streams together that may wait for the client: the core holds back the rest, within its limits.
AHEAD: Final = 4


class SharedStream:
    """An `AsyncStream` of several. The first that fails ends all."""

    def __init__(self, streams: Sequence[AsyncStream]) -> None:
        self._streams = streams
        self._open = len(streams)
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(AHEAD)
        self._readers: list[asyncio.Task[None]] = []
        self._last: CompletionChunk | None = None
        self._usages: list[ChatUsage] = []
        self._aborted = False
        self._stopped = False

    @property
    def aborted(self) -> bool:
        """Whether `abort` came before the end."""
        return self._aborted

    async def opened(self) -> None:
        """Wait until the core has accepted all. Raises the LmserveError of the first that it refuses."""
        for stream in self._streams:
            await stream.opened()
        self._readers = [asyncio.create_task(self._read(stream)) for stream in self._streams]

    def chunks(self) -> Self:
        """The events as they come, as an async iterator."""
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self._chunks.get()
        if chunk is None:
            raise StopAsyncIteration
        self._room.release()
        return chunk

    def abort(self) -> None:
        """Stop all requests. Idempotent."""
        self._aborted |= self._open > 0
        self._stop()
        # They may wait for room that will not become free any more.
        for reader in self._readers:
            reader.cancel()
        self._chunks.put_nowait(None)

    def _stop(self) -> None:
        self._stopped = True
        for stream in self._streams:
            stream.abort()

    async def _read(self, stream: AsyncStream) -> None:
        try:
            async for chunk in stream.chunks():
                await self._room.acquire()
                if self._stopped:
                    self._room.release()
                    break
                # The core hands out whole events.
                events = chunk.removesuffix(DONE)
                if len(events) < len(chunk):
                    events = self._end_of(events)
                if events:
                    self._chunks.put_nowait(events)
                else:
                    self._room.release()
        finally:
            self._open -= 1
            if self._open == 0:
                self._chunks.put_nowait(None)

    def _end_of(self, events: bytes) -> bytes:
        """What is to be sent of a stream's last events; those of the last stream end the whole."""
        *_, last = events.removesuffix(EVENT_END).rsplit(EVENT_END, 1)
        if last.startswith(ERROR):
            self._stop()
            return events + DONE
        chunk = msgspec.json.decode(last.removeprefix(DATA), type=CompletionChunk) if last else None
        if chunk is not None and not chunk.choices and isinstance(chunk.usage, ChatUsage):
            self._last = chunk
            self._usages.append(chunk.usage)
            events = events[: -len(last) - len(EVENT_END)]
        if self._open > 1:
            return events
        if self._last is not None:
            total = msgspec.structs.replace(self._last, usage=total_usage(self._usages))
            events += DATA + msgspec.json.encode(total) + EVENT_END
        return events + DONE


def total_usage(usages: Sequence[ChatUsage]) -> ChatUsage:
    """The tokens of several requests."""
    details = [usage.prompt_tokens_details for usage in usages]
    cached = sum(detail.cached_tokens for detail in details if isinstance(detail, PromptTokensDetails))
    return ChatUsage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )
