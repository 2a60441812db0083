"""What is written down about each request once its reply has ended: a count, a line of the log, a span."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from litestar.enums import ScopeType
from litestar.types import HTTPScope, WebSocketScope

from lmserve.api.batches.inner_request import BATCH, NOT_NOW
from lmserve.api.http.request_log import Entry, Form, total, write
from lmserve.api.http.serving import Serving
from lmserve.engine.stream import AsyncStream
from lmserve.keys import NO_TENANT

if TYPE_CHECKING:
    from lmserve.api.http.tracing import Tracing

MAX_PATH: Final = 512  # characters of a path in the request log
SOCKET: Final = "WEBSOCKET"  # the method of what came as a message of a WebSocket
UNKNOWN: Final = "unknown"  # stands for all paths that are no route

AnyScope = HTTPScope | WebSocketScope


class Accounting:
    """Where requests are counted, logged and traced."""

    def __init__(self, serving: Serving, request_log: Form, tracing: Tracing | None) -> None:
        """`request_log`: the form of the log's lines. `tracing`: where spans go; None: nowhere."""
        self._serving = serving
        self._request_log = request_log
        self._tracing = tracing

    def ended(
        self, sent: AnyScope, inner: AnyScope, status: int, seconds: float, streams: Sequence[AsyncStream]
    ) -> None:
        """A reply has ended. `sent`: the request as it came, `inner`: as the application saw it.

        A line of a batch is no HTTP request. One that has to wait for room has no line in the log before it is taken.
        """
        route: str | None = inner.get("path_template")
        batch: str | None = inner["state"].get(BATCH)
        if batch is None:
            self._serving.http[route or UNKNOWN, status] += 1
        elif status in NOT_NOW:
            return
        # A handshake is a GET (RFC 6455, 4.1).
        method = "GET" if sent["type"] == ScopeType.WEBSOCKET else sent["method"]
        self._write(method, sent, inner, status, seconds, streams)

    def reply_ended(
        self, sent: AnyScope, inner: AnyScope, status: int, seconds: float, streams: Sequence[AsyncStream]
    ) -> None:
        """A reply on an open WebSocket has ended; `status` is what a reply over HTTP would have."""
        self._write(SOCKET, sent, inner, status, seconds, streams)

    def _write(
        self,
        method: str,
        sent: AnyScope,
        inner: AnyScope,
        status: int,
        seconds: float,
        streams: Sequence[AsyncStream],
    ) -> None:
        if self._request_log == "off" and self._tracing is None:
            return
        record, client, state = total(stream.record for stream in streams), sent.get("client"), inner["state"]
        entry = Entry(
            id=state["request_id"],
            key=self._serving.keys.name_of(state.get("tenant", NO_TENANT)),
            client=None if client is None else client[0],
            method=method,
            # Still quoted: it holds no line break.
            path=(sent["raw_path"] or quote(sent["path"]).encode()).decode("latin-1")[:MAX_PATH],
            status=status,
            session=_session_of(streams),
            batch=state.get(BATCH),
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            completion_tokens=record.completion_tokens,
            queue_s=_rounded(record.queued),
            first_token_s=_rounded(record.first_token),
            duration_s=round(seconds, 6),
            ended_ns=time.time_ns(),
        )
        write(self._request_log, entry)
        if self._tracing is not None:
            model, given = self._serving.names[0], dict(sent["headers"])
            route = inner.get("path_template")
            self._tracing.request(entry, route=route, scheme=sent["scheme"], model=model, given=given)


def _session_of(streams: Iterable[AsyncStream]) -> int | str | None:
    """The session that a client named; those below -1 are the server's own."""
    named = (stream.session for stream in streams if stream.session is not None)
    return next((session for session in named if isinstance(session, str) or session >= 0), None)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
