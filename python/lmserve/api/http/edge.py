"""What stands around all routes, and around the replies to what is no route, in plain ASGI.

Every reply has the request's id. HEAD is answered where GET is. Pages of other sites are kept out of a server without
keys. OpenAI's paths work without /v1.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Iterable, Sequence
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from lmserve.api.http.errors import ANTHROPIC, error_body
from lmserve.errors import LmserveError

REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")
READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
ANY: Final = "*"  # every host, or every origin
VERSION: Final = "/v1"
# Longest quotation of what was given, in characters.
MAX_QUOTE: Final = 80


class Edge:
    """The application with what every request and every reply goes through."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        paths: Iterable[str],
        keys: bool,
        hosts: Collection[str] | None,
        origins: Sequence[str],
    ) -> None:
        """`paths`: of all routes. `keys`: requests must have one, and then pages of other sites cannot send any.

        `hosts`: names that requests may give as the server's, besides those of this machine (localhost, 127.0.0.1);
        None: any. `origins`: of pages that may use the server.
        """
        self._app = app
        self._keys = keys
        self._hosts = None if hosts is None or ANY in hosts else frozenset(map(str.lower, hosts))
        self._origins = frozenset(map(str.lower, origins))
        self._unversioned = unversioned(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
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
            inner["raw_path"] = VERSION.encode() + scope.get("raw_path", scope["path"].encode())
        sender = _Sender(send, request_id, scope["path"], head=method == "HEAD")
        try:
            self._check_host(given.get(b"host"))
            self._check_origin(method, given.get(b"origin"), given.get(b"host"))
        except LmserveError as error:
            await _reply(error, scope["path"], sender.send)
            return
        await self._app(inner, receive, sender.send)

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


class _Sender:
    """Adds the request's id to a reply, and leaves out the body where only its head was asked for."""

    def __init__(self, send: Send, request_id: bytes, path: str, *, head: bool) -> None:
        self._send = send
        self._ids = [(b"x-request-id", request_id)]
        if path.startswith(ANTHROPIC):
            self._ids.append((b"request-id", request_id))
        self._head = head
        self._ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
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
