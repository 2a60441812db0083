"""Refuses a WebSocket before it is open, with the status and body that an ordinary request would get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from litestar.types import Scope, Send

from lmserve.api.http.errors import error_body
from lmserve.engine.stream import AsyncStream
from lmserve.errors import LmserveError

# In the state of a handshake: what is called with status, seconds and streams of each reply that has ended.
ACCOUNT: Final = "account"
Account = Callable[[int, float, Sequence[AsyncStream]], None]


async def deny(error: LmserveError, scope: Scope, send: Send) -> None:
    """Answer the handshake with an HTTP error (RFC 6455, 4.2.2)."""
    body = msgspec.json.encode(error_body(error, scope["path"]))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    # The ASGI extension of that name; litestar's types do not know it.
    start: Any = {"type": "websocket.http.response.start", "status": error.status, "headers": headers}
    rest: Any = {"type": "websocket.http.response.body", "body": body}
    await send(start)
    await send(rest)
