"""Replies that the core writes: finished bytes from an engine stream to the client, aborted when the client leaves.

Litestar's own streaming costs several times as much for each chunk, and never cancels a handler whose client has left.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from litestar import Request, Response
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from lmserve.api.errors import log_client_left
from lmserve.engine.async_engine import AsyncStream


class EngineReply(Response[AsyncStream]):
    """A reply of the core, whole or streamed. The status is sent once the core has accepted the request.

    An error before that is raised, and so gets its own status.
    """

    def __init__(self, content: AsyncStream, *, media_type: str = "application/json", stream: bool = False) -> None:
        super().__init__(content, media_type=media_type)
        self._stream = stream

    def to_asgi_response(self, app: Any, request: Request[Any, Any, Any], **_: Any) -> ASGIResponse:
        """An ASGI callable over the stream."""
        del app, request
        send_reply = _StreamedReply if self._stream else _WholeReply
        return send_reply(self.content, str(self.media_type))


class WholeReply(Protocol):
    """A reply that comes all at once: an `AsyncStream`, or what gathers several."""

    async def body(self) -> bytes:
        """The reply's JSON. Raises LmserveError if the request fails, or 499 after `abort`."""

    def abort(self) -> None:
        """Stop the request. Does nothing after the reply's end. Idempotent."""


class GatheredReply(Response[WholeReply]):
    """A whole reply that several requests of the core make up."""

    def to_asgi_response(self, app: Any, request: Request[Any, Any, Any], **_: Any) -> ASGIResponse:
        """An ASGI callable over the requests."""
        del app, request
        return _WholeReply(self.content, "application/json")


class _WholeReply(ASGIResponse):
    def __init__(self, stream: WholeReply, media_type: str) -> None:
        self._stream = stream
        self._media_type = media_type.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_abort_on_disconnect(receive, self._stream))
        try:
            await self._send(scope, send)
        finally:
            watcher.cancel()
            self._stream.abort()

    async def _send(self, scope: Scope, send: Send) -> None:
        del scope
        body = await self._stream.body()
        length = str(len(body)).encode()
        headers = [(b"content-type", self._media_type), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class _StreamedReply(_WholeReply):
    _stream: AsyncStream

    async def _send(self, scope: Scope, send: Send) -> None:
        await self._stream.opened()
        # Proxies must not collect the frames.
        headers = [(b"content-type", self._media_type), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for chunk in self._stream.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if self._stream.aborted:
            log_client_left(scope)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _abort_on_disconnect(receive: Receive, stream: WholeReply) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.abort()
