"""Plain ASGI around all routes, and around replies for unknown paths.

Every reply has the request's id. Routes that answer GET also answer HEAD. A server without keys refuses requests from
pages of other sites. OpenAI's paths also work without /v1.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send, WebSocketScope

from lmserve.api.http.accounting import Accounting
from lmserve.api.http.errors import ANTHROPIC, CLIENT_CLOSED_REQUEST, CLIENT_LEFT, error_body
from lmserve.api.http.websocket import ACCOUNT, deny
from lmserve.engine.stream import AsyncStream, begun
from lmserve.errors import LmserveError
from lmserve.keys import Keyring

REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")
READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
ANY: Final = "*"  # every host, or every origin
VERSION: Final = "/v1"
# Names of sessions may hold slashes and percent signs.
QUOTED: Final = re.compile(rb"^/v1/sessions/.*%2(?:5|f)", re.IGNORECASE)
# A session may be called as the last part of this route, which has no GET and no DELETE.
IMPORT: Final = "/v1/sessions/import"
CALLED_IMPORT: Final = "/v1/sessions/%69mport"
SWITCHING: Final = 101  # the status of a handshake after which a WebSocket is open
# Longest quotation of what was given, in characters.
MAX_QUOTE: Final = 80


class Edge:
    """The application with what every request and every reply goes through."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        paths: Iterable[str],
        keys: Keyring,
        accounting: Accounting,
        hosts: Collection[str] | None,
        origins: Sequence[str],
    ) -> None:
        """`paths`: of all routes. `keys`: where there are none, pages of other origins can change nothing.

        `hosts`: names that requests may give as the server's, besides those of this machine (localhost, 127.0.0.1);
        None: any. `origins`: of pages that may use the server.
        """
        self._app = app
        self._keys = keys
        self._accounting = accounting
        self._hosts = None if hosts is None or ANY in hosts else frozenset(map(str.lower, hosts))
        self._origins = frozenset(map(str.lower, origins))
        self._unversioned = unversioned(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.WEBSOCKET:
            await self._open_socket(scope, receive, send)
            return
        given = {name: value for name, value in scope["headers"] if name in (b"host", b"origin", b"x-request-id")}
        request_id = given.get(b"x-request-id", b"")
        if REQUEST_ID.fullmatch(request_id) is None:
            request_id = uuid.uuid4().hex.encode()
        method = scope["method"]
        inner: HTTPScope = {**scope, "state": {**scope.get("state", {}), "request_id": request_id.decode()}}
        if method == "HEAD":
            inner["method"] = "GET"
        if scope["path"].partition("/")[2].partition("/")[0] in self._unversioned:
            inner["path"] = VERSION + scope["path"]
            inner["raw_path"] = VERSION.encode() + (scope["raw_path"] or b"")
        if QUOTED.search(inner["raw_path"] or b""):
            inner["path"] = quoted_twice(inner["raw_path"] or b"")
        elif inner["path"] == IMPORT and inner["method"] in ("GET", "DELETE"):
            inner["path"] = CALLED_IMPORT
        sender = _Sender(send, request_id, inner["path"], head=method == "HEAD")
        started, streams = time.monotonic(), list[AsyncStream]()
        token = begun.set(streams)
        try:
            refusal = self._refusal(method, given.get(b"host"), given.get(b"origin"))
            if refusal is None:
                await self._app(inner, receive, sender.send)
            else:
                await _reply(refusal, inner["path"], sender.send)
        finally:
            begun.reset(token)
            status = CLIENT_CLOSED_REQUEST if inner["state"].get(CLIENT_LEFT) else sender.status
            self._accounting.ended(scope, inner, status, time.monotonic() - started, streams)

    async def _open_socket(self, scope: WebSocketScope, receive: Receive, send: Send) -> None:
        given = {name: value for name, value in scope["headers"] if name in (b"host", b"origin", b"x-request-id")}
        request_id = given.get(b"x-request-id", b"")
        if REQUEST_ID.fullmatch(request_id) is None:
            request_id = uuid.uuid4().hex.encode()
        inner: WebSocketScope = {**scope, "state": {**scope.get("state", {}), "request_id": request_id.decode()}}
        if scope["path"].partition("/")[2].partition("/")[0] in self._unversioned:
            inner["path"] = VERSION + scope["path"]
            inner["raw_path"] = VERSION.encode() + (scope["raw_path"] or b"")
        # A page of another origin can open a socket without asking.
        refusal = self._refusal("POST", given.get(b"host"), given.get(b"origin"))
        inner["state"][ACCOUNT] = partial(self._accounting.reply_ended, scope, inner)
        status, started = 500, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            told: Any = message
            status = SWITCHING if told["type"] == "websocket.accept" else told.get("status", status)
            await send(message)

        try:
            if refusal is None:
                await self._app(inner, receive, watched)
            else:
                await deny(refusal, inner, watched)
        finally:
            self._accounting.ended(scope, inner, status, time.monotonic() - started, [])

    def _refusal(self, method: str, host: bytes | None, origin: bytes | None) -> LmserveError | None:
        try:
            self._check_host(host)
            self._check_origin(method, origin, host)
        except LmserveError as error:
            return error
        return None

    def _check_host(self, host: bytes | None) -> None:
        if self._hosts is None or host is None or self._is_ours(_host_name(host.decode("latin-1"))):
            return
        message = f"Host must be a name of this server, but {_quoted(host)} was given; --allowed-host allows others"
        raise LmserveError.new(403, "host_not_allowed", message)

    def _check_origin(self, method: str, origin: bytes | None, host: bytes | None) -> None:
        """A page can send some requests without asking, and its browser keeps only the replies from it."""
        if origin is None or self._keys or (self._hosts is None and method in READING):
            return
        text = origin.decode("latin-1").lower()
        if text in self._origins or ANY in self._origins:
            return
        place = urlsplit(text) if "://" in text and "[" not in text else None
        if place is not None and host is not None and place.netloc == host.decode("latin-1").lower():
            return
        if self._hosts is not None and self._is_ours(_host_name(text.partition("://")[2])):
            return
        message = f"pages of {_quoted(origin)} may not use this server; --cors-origin allows them"
        raise LmserveError.new(403, "origin_not_allowed", message)

    def _is_ours(self, name: str) -> bool:
        return self._hosts is not None and (name in self._hosts or is_loopback(name))


def unversioned(paths: Iterable[str]) -> frozenset[str]:
    """First parts of the paths that stand only below /v1."""
    first: dict[bool, set[str]] = {True: set(), False: set()}
    for path in paths:
        versioned = path.startswith(VERSION + "/")
        first[versioned].add(path.removeprefix(VERSION).split("/")[1])
    return frozenset(first[True] - first[False])


def is_loopback(host: str) -> bool:
    """Whether the host is this machine as it calls itself: localhost (RFC 6761), or an address such as 127.0.0.1."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(text: str) -> str:
    """The name in `name:port` or `[address]:port`."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].lower().removesuffix(".")


def _quoted(given: bytes) -> str:
    return repr(given.decode("latin-1")[:MAX_QUOTE])


def quoted_twice(raw_path: bytes) -> str:
    """A path of which each part is one again where it holds a slash: its slashes and percent signs stay quoted."""
    parts = (unquote(part) for part in raw_path.decode("latin-1").split("/"))
    return "/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)


class _Sender:
    """Adds the request's id to a reply, and leaves out the body where only its head was asked for."""

    def __init__(self, send: Send, request_id: bytes, path: str, *, head: bool) -> None:
        self._send = send
        self._ids = [(b"x-request-id", request_id)]
        if path.startswith(ANTHROPIC):
            self._ids.append((b"request-id", request_id))
        self._head = head
        self._ended = False
        self.status = 500  # of the reply; what there is if the application fails

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [(name, _with_head(value) if name == b"allow" else value) for name, value in message["headers"]]
            await self._send({**message, "headers": [*headers, *self._ids]})
            if self._head:
                # The handler may still have much to send, and finds that its client has left.
                self._ended = True
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        elif not self._ended:
            await self._send(message)


def _with_head(allowed: bytes) -> bytes:
    """Methods of `Allow`, with HEAD where GET is."""
    methods = {method.strip() for method in allowed.split(b",")}
    return b", ".join(sorted(methods | {b"HEAD"} if b"GET" in methods else methods))


async def _reply(error: LmserveError, path: str, send: Send) -> None:
    body = msgspec.json.encode(error_body(error, path))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
