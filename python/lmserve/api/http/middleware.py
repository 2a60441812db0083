"""Plain ASGI in front of every handler: checks the API key, and the body's size and deadline."""

from __future__ import annotations

import asyncio
from typing import Final

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPRequestEvent, Receive, ReceiveMessage, Scope, Send

from lmserve.api.batches.inner_request import ON_BEHALF_OF
from lmserve.api.http.websocket import deny
from lmserve.errors import LmserveError
from lmserve.keys import NO_TENANT, Keyring

PUBLIC: Final = "public"  # in a handler's `opt`: needs no key

BODILESS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
# A body over the limit is read, and thrown away, up to so many times the limit: many clients read no reply before they
# have sent everything.
DISCARD_FACTOR: Final = 4


class ApiKeys:
    """Asks for a key (`Authorization: Bearer`, or `x-api-key`) and puts its tenant into the request's state."""

    def __init__(self, app: ASGIApp, keys: Keyring) -> None:
        """`keys`: where there are none, no key is asked for, and all are one tenant."""
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        trusted = scope["state"].get(ON_BEHALF_OF)
        if trusted is not None:
            # A request of the server itself.
            scope["state"]["tenant"] = trusted
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["tenant"] = self._tenant(scope) if self._keys else NO_TENANT
        except LmserveError as error:
            if scope["type"] != ScopeType.WEBSOCKET:
                raise
            await deny(error, scope, send)
            return
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> int:
        if scope["route_handler"].opt.get(PUBLIC):
            return NO_TENANT
        headers = dict(scope["headers"])
        key = headers.get(b"x-api-key")
        given = headers.get(b"authorization")
        if given is not None:
            scheme, _, key = given.partition(b" ")
            if scheme.lower() != b"bearer":
                raise _unauthorized("Authorization must be `Bearer KEY`, but another scheme was given")
        if key is None:
            raise _unauthorized("an API key is required: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`")
        tenant = self._keys.tenant_of(key.strip())
        if tenant is None:
            raise _unauthorized("this server does not know the given API key")
        return tenant


def _unauthorized(message: str) -> LmserveError:
    return LmserveError.new(401, "invalid_api_key", message)


class BodyLimits:
    """Reads the body before the handler runs, with a limit of its bytes and a deadline."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or scope["method"] in BODILESS:
            await self._app(scope, receive, send)
            return
        message: HTTPRequestEvent | None = {
            "type": "http.request",
            "body": await self._read(scope, receive),
            "more_body": False,
        }

        async def receive_read() -> ReceiveMessage:
            nonlocal message
            if message is None:
                return await receive()
            read, message = message, None
            return read

        await self._app(scope, receive_read, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        announced = expects = None
        for name, value in scope["headers"]:
            if name == b"content-length":
                announced = int(value) if value.isdigit() else None
            elif name == b"expect":
                expects = value
        if announced is not None and announced > self._max_bytes and (expects or announced > self._discard_limit):
            raise self._too_large(announced)
        parts = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise LmserveError.new(499, "client_closed_request", "the client left before the body's end")
                    size += len(message["body"])
                    if size <= self._max_bytes:
                        parts.append(message["body"])
                    elif size > self._discard_limit:
                        raise self._too_large(size)
                    more = message["more_body"]
        except TimeoutError as error:
            text = f"the body must arrive within {self._timeout:g} seconds, but only {size} bytes have"
            raise LmserveError.new(408, "request_timeout", text) from error
        if size > self._max_bytes:
            raise self._too_large(size)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def _discard_limit(self) -> int:
        return self._max_bytes * DISCARD_FACTOR

    def _too_large(self, size: int) -> LmserveError:
        message = f"the body may have at most {self._max_bytes} bytes, but {size} were given"
        return LmserveError.new(413, "body_too_large", message, max_bytes=self._max_bytes)
