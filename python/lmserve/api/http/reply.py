"""Sends replies that the core writes, finished bytes from an engine stream, and aborts if the client disconnects.

Litestar's own streaming costs several times as much per chunk, and never cancels a handler whose client disconnects.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from litestar import Request, Response
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from lmserve.api.http.errors import log_client_left, rate_limit_headers
from lmserve.api.http.serving import serving_of, tenant_of

# Bytes up to which a reply is made on the event loop: a thread would take longer.
INLINE: Final = 262_144


async def rewritten(bodies: Sequence[bytes], work: Callable[[], bytes]) -> bytes:
    """What `work` makes of the core's replies `bodies`; on a thread, if they are large."""
    if sum(map(len, bodies)) <= INLINE:
        return work()
    return await asyncio.to_thread(work)


class WholeBody(Protocol):
    """A reply that comes all at once: an `AsyncStream`, or what gathers several."""

    async def body(self) -> bytes:
        """The reply's JSON. Raises LmserveError if the request fails, or 499 after `abort`."""

    def abort(self) -> None:
        """Stop the request. Does nothing after the reply's end. Idempotent."""


class EventStream(Protocol):
    """A reply that comes in pieces: an `AsyncStream`, or what mixes several."""

    @property
    def aborted(self) -> bool:
        """Whether `abort` came before the reply's end."""

    async def opened(self) -> None:
        """Wait until the core has accepted the request. Raises LmserveError if it refuses, or 499 after `abort`."""

    def chunks(self) -> AsyncIterator[bytes]:
        """The reply's bytes as they come. It just ends after `abort`."""

    def abort(self) -> None:
        """Stop the request. Does nothing after the reply's end. Idempotent."""


class EngineReply(Response[WholeBody]):
    """A whole reply of the core, as JSON. An error is raised, and so gets its own status."""

    def to_asgi_response(self, app: Any, request: Request[Any, Any, Any], **_: Any) -> ASGIResponse:
        """An ASGI callable over the request."""
        del app
        return _WholeReply(self.content, request, self.headers)


class StreamedReply(Response[EventStream]):
    """A streamed reply of the core. The status is sent once the core has accepted the request.

    An error before that is raised, and so gets its own status.
    """

    def to_asgi_response(self, app: Any, request: Request[Any, Any, Any], **_: Any) -> ASGIResponse:
        """An ASGI callable over the stream."""
        del app
        return _StreamedReply(self.content, request, self.headers, str(self.media_type))


def sse_reply(stream: EventStream, headers: Mapping[str, str] | None = None) -> StreamedReply:
    """Server-sent events. `headers`: of the reply, beside its own."""
    return StreamedReply(stream, media_type="text/event-stream; charset=utf-8", headers=headers)


class _AbortedByClient(ASGIResponse):
    def __init__(
        self, reply: WholeBody | EventStream, request: Request[Any, Any, Any], headers: Mapping[str, str]
    ) -> None:
        self._reply = reply
        self._request = request
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_abort_on_disconnect(receive, self._reply))
        try:
            await self._send(scope, send)
        finally:
            watcher.cancel()
            self._reply.abort()

    def _further_headers(self) -> list[tuple[bytes, bytes]]:
        quota = serving_of(self._request).quota(tenant_of(self._request))
        headers = {**rate_limit_headers(quota), **self._headers}
        return [(name.encode(), value.encode()) for name, value in headers.items()]

    async def _send(self, scope: Scope, send: Send) -> None:
        raise NotImplementedError


class _WholeReply(_AbortedByClient):
    def __init__(self, whole: WholeBody, request: Request[Any, Any, Any], headers: Mapping[str, str]) -> None:
        super().__init__(whole, request, headers)
        self._whole = whole

    async def _send(self, scope: Scope, send: Send) -> None:
        del scope
        body = await self._whole.body()
        length = str(len(body)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length), *self._further_headers()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class _StreamedReply(_AbortedByClient):
    def __init__(
        self, stream: EventStream, request: Request[Any, Any, Any], headers: Mapping[str, str], media_type: str
    ) -> None:
        super().__init__(stream, request, headers)
        self._stream = stream
        self._media_type = media_type.encode()

    async def _send(self, scope: Scope, send: Send) -> None:
        await self._stream.opened()
        # Proxies must not collect the frames.
        headers = [(b"content-type", self._media_type), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        headers += self._further_headers()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for chunk in self._stream.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if self._stream.aborted:
            log_client_left(scope)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _abort_on_disconnect(receive: Receive, reply: WholeBody | EventStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reply.abort()
