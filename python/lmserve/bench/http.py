"""A lean HTTP/1.1 client, whose own cost must not distort the measurement.

A general client takes several times as long per chunk of a stream, so many fast streams would measure the client.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from time import perf_counter
from typing import Final
from urllib.parse import urlsplit

import httptools

CONNECT_TIMEOUT: Final = 10.0

# Called with the bytes of a reply's body as they come, and the time at which they did.
Receive = Callable[[bytes, float], None]


class HttpError(Exception):
    """No whole reply came; the message says why."""


class Target:
    """Where requests go: the base URL, with or without /v1, and the headers that every request has."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises ValueError if `url` is no http or https URL."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a URL such as http://127.0.0.1:23333 is needed, but {url!r} was given")
        self.tls = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if self.tls else 80)
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.prefix}"
        fields = [f"Host: {parts.netloc.rpartition('@')[2]}", "Accept: */*", "Content-Type: application/json"]
        if api_key is not None:
            fields.append(f"Authorization: Bearer {api_key}")
        self.fields = "\r\n".join(fields)


class Connection(asyncio.Protocol):
    """One connection, opened when it is first needed and again when the server has closed it."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._receive: Receive | None = None
        self._done: asyncio.Future[int] | None = None
        self._answered = False  # a byte of the reply has come
        self._head_done = False
        self._sized = False  # a body of no announced length ends with the connection
        self._now = 0.0

    async def request(self, method: str, path: str, body: bytes, receive: Receive) -> int:
        """Send one request and hand its reply's body to `receive`; the status, once the whole reply is here.

        Raises HttpError if no connection can be made, or it ends before the reply does.
        """
        transport = self._transport
        reused = transport is not None and not transport.is_closing()
        if transport is None or transport.is_closing():
            transport = await self._connect()
        self._parser = httptools.HttpResponseParser(self)
        self._receive = receive
        self._answered = self._head_done = self._sized = False
        self._done = asyncio.get_running_loop().create_future()
        first = f"{method} {self._target.prefix}{path} HTTP/1.1"
        head = f"{first}\r\n{self._target.fields}\r\nContent-Length: {len(body)}\r\n\r\n"
        transport.write(head.encode() + body)
        try:
            return await self._done
        except HttpError:
            if not reused or self._answered:
                raise
        except asyncio.CancelledError:
            self.close()
            raise
        # The server had closed the connection, and its word of that and the request passed each other.
        return await self.request(method, path, body, receive)

    async def _connect(self) -> asyncio.Transport:
        target = self._target
        loop = asyncio.get_running_loop()
        tls = ssl.create_default_context() if target.tls else None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                transport, _ = await loop.create_connection(lambda: self, target.host, target.port, ssl=tls)
        except TimeoutError as error:
            raise HttpError(f"no connection within {CONNECT_TIMEOUT:g} s") from error
        except OSError as error:
            raise HttpError(f"no connection: {error.strerror or error}") from error
        self._transport = transport
        return transport

    def close(self) -> None:
        """Give the connection up. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # What asyncio calls.

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        if self._parser is None:
            return
        self._answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the reply is not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._head_done and not self._sized and exc is None:
            self.on_message_complete()
        else:
            self._fail("the server closed the connection before the reply's end")

    # What the parser calls.

    def on_header(self, name: bytes, _value: bytes) -> None:
        self._sized |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._head_done = True

    def on_body(self, body: bytes) -> None:
        if self._receive is not None:
            self._receive(body, self._now)

    def on_message_complete(self) -> None:
        parser = self._parser
        if parser is None:
            return
        if self._done is not None and not self._done.done():
            self._done.set_result(parser.get_status_code())
        if not parser.should_keep_alive():
            self.close()

    def _fail(self, why: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(HttpError(why))
        self.close()
