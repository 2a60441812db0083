"""A request that the server sends itself, through the same routes as a client's."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, Final, NamedTuple

from litestar.types import ASGIApp, Message, Scope

# In a request's state, where no client can put it: whose it is, and of which batch.
ON_BEHALF_OF: Final = "on_behalf_of"
BATCH: Final = "batch"

# Status of a reply after which the request is sent again; so is one whose session or conversation is busy.
NOT_NOW: Final = (429, 503)
CONFLICT: Final = 409


class InnerReply(NamedTuple):
    """What came back."""

    status: int
    request_id: str
    retry_after: float | None  # seconds
    body: bytes

    @property
    def is_not_now(self) -> bool:
        """Whether the same request may get another reply later."""
        return self.status in NOT_NOW or (self.status == CONFLICT and self.retry_after is not None)


async def post(app: ASGIApp, tenant: int, batch: str, path: str, body: bytes) -> InnerReply:
    """Send JSON as the holder of a tenant's key."""
    request_id = uuid.uuid4().hex
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id.encode()),
    ]
    scope: Any = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "state": {ON_BEHALF_OF: tenant, BATCH: batch},
        "extensions": {},
    }
    given = False
    status, retry_after, parts = 500, None, list[bytes]()

    async def receive() -> Any:
        nonlocal given
        if given:
            # The client stays until it has its reply.
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, retry_after
        if message["type"] == "http.response.start":
            status = message["status"]
            after = dict(message["headers"]).get(b"retry-after")
            retry_after = None if after is None else float(after)
        elif message["type"] == "http.response.body":
            parts.append(message["body"])

    asked: Scope = scope
    await app(asked, receive, send)
    return InnerReply(status, request_id, retry_after, b"".join(parts))
