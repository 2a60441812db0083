"""Responses over a WebSocket: each request names the previous one and sends only what is new.

The last response of a connection can be continued there even if it is not stored: its session is kept until the next
response exists, or until the connection ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import msgspec
from msgspec import Raw

from lmserve.api.convert.parameters import given_or
from lmserve.api.convert.unsupported import Ignored
from lmserve.api.http.body import decode_json
from lmserve.api.http.errors import CLIENT_CLOSED_REQUEST
from lmserve.api.http.serving import Serving
from lmserve.api.http.websocket import Account
from lmserve.api.responses.begin import begin
from lmserve.api.responses.outcome import RecordedResponse, end_tip
from lmserve.api.responses.turn import ResponseTurn
from lmserve.api.state.conversations import Standing, Tip
from lmserve.engine.stream import AsyncStream, begun
from lmserve.errors import LmserveError
from lmserve.schemas.responses import ResponsesRequest

logger = logging.getLogger("lmserve.http")

ROUTE: Final = "/v1/responses (WebSocket)"
CREATE: Final = "response.create"
MAX_QUOTE: Final = 80
# Of a request's members those that belong to the socket, or are so in any case.
ENVELOPE: Final = ("type", "stream", "generate")

_decode_members = msgspec.json.Decoder(dict[str, Raw])
_decode_request = msgspec.json.Decoder(ResponsesRequest)

Send = Callable[[str], Awaitable[None]]
Lane = Callable[[ResponsesRequest], str | None]


class ResponsesSocket:
    """One connection. One response runs at a time."""

    def __init__(self, serving: Serving, tenant: int, lane: Lane, send: Send, account: Account) -> None:
        """`send`: writes a text message. `lane`: that of a request. `account`: told of each reply's end."""
        self._serving = serving
        self._tenant = tenant
        self._lane = lane
        self._send = send
        self._account = account
        self._last: Standing | None = None  # `id` is the last response's
        self._running: asyncio.Task[None] | None = None
        self._ending = False  # its last message is sent, or about to be

    async def receive(self, message: bytes) -> None:
        """Begin what a message asks for. An error is sent."""
        if self._running is not None and self._ending:
            await asyncio.wait([self._running])
        if self._running is not None and not self._running.done():
            text = "a response is running on this connection; wait for its last event, or open another connection"
            await self._refuse_message(LmserveError.new(409, "response_running", text))
            return
        try:
            data, generate = request_of(message)
        except LmserveError as error:
            await self._refuse_message(error)
            return
        self._ending = False
        self._running = asyncio.create_task(self._run(data, generate=generate))

    async def close(self) -> None:
        """The client left: what runs is stopped, and what only this connection could go on from is dropped."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        with suppress(LmserveError):
            await self._went_on(None)

    async def _run(self, data: ResponsesRequest, *, generate: bool) -> None:
        status, started, streams = CLIENT_CLOSED_REQUEST, time.monotonic(), list[AsyncStream]()
        begun.set(streams)
        try:
            await self._respond(self._serving.with_model(data), generate=generate)
            status = 200
        except LmserveError as error:
            self._ending, status = True, error.status
            await self._refuse(error)
        except OSError:
            # The client has disconnected; `close` reports it.
            return
        except Exception:
            status = 500
            logger.exception("a response over a WebSocket failed")
            await self._refuse(LmserveError.new(500, "internal_error", "the server failed; see its log for the reason"))
        finally:
            self._account(status, time.monotonic() - started, streams)

    async def _respond(self, data: ResponsesRequest, *, generate: bool) -> None:
        if data.background:
            raise LmserveError.invalid("background", "background is not supported over a WebSocket, but true was given")
        data, ignored = msgspec.structs.replace(data, stream=True), Ignored(ROUTE)
        if data.conversation is not None:
            response = await begin(data, ignored, self._serving, self._tenant, self._lane(data))
            if isinstance(response, RecordedResponse):
                await self._tell(response)
            return
        turn = ResponseTurn(data, ignored, self._serving, self._tenant, self._lane(data), self._before(data))
        if not generate:
            self._ending = True
            for event in turn.events_without_output():
                await self._send(event.decode())
            await self._went_on(turn.standing_without_output())
            return
        recorded = turn.start()
        try:
            await self._tell(recorded)
        finally:
            # Even where the client left before it heard of the end: `close` then gives up the session.
            if recorded.kept:
                await self._went_on(Standing(turn.id, turn.instructions, Tip(turn.id, turn.stores), []))

    def _before(self, data: ResponsesRequest) -> Standing:
        """The response from which the request continues."""
        parent = data.previous_response_id
        if parent is None:
            return Standing("", None, None, [])
        if self._last is not None and self._last.id == parent:
            return self._last
        stored = self._serving.responses.get(self._tenant, parent)
        return Standing(parent, None if stored is None else stored.instructions, Tip(parent, stored=True), [])

    async def _went_on(self, standing: Standing | None) -> None:
        """Where the connection stands now; what it stood on before is given up."""
        last, self._last = self._last, standing
        if last is not None and (standing is None or standing.tip != last.tip):
            await end_tip(self._serving.engine, self._tenant, last.tip)

    async def _tell(self, recorded: RecordedResponse) -> None:
        try:
            await recorded.opened()
            async for events in recorded.chunks():
                self._ending = recorded.ended
                for event in events.split(b"\n\n"):
                    _, found, body = event.partition(b"\ndata: ")
                    if found:
                        await self._send(body.decode())
        finally:
            recorded.abort()

    async def _refuse_message(self, error: LmserveError) -> None:
        self._account(error.status, 0.0, [])
        await self._refuse(error)

    async def _refuse(self, error: LmserveError) -> None:
        told: dict[str, Any] = {"type": "error", "status": error.status, "error": error.error}
        with suppress(OSError):
            await self._send(msgspec.json.encode(told).decode())


def request_of(message: bytes) -> tuple[ResponsesRequest, bool]:
    """The request in a message, and whether to generate. Raises LmserveError (400)."""
    members = decode_json(message, _decode_members)
    kind = _member(members, "type", str)
    if kind != CREATE:
        given = "none" if kind is None else repr(kind[:MAX_QUOTE])
        raise LmserveError.invalid("type", f"the type of a message must be {CREATE!r}, but {given} was given")
    _member(members, "stream", bool)
    generate = given_or(_member(members, "generate", bool), True)
    rest = {name: value for name, value in members.items() if name not in ENVELOPE}
    return decode_json(msgspec.json.encode(rest), _decode_request), generate


def _member(members: dict[str, Raw], name: str, kind: type) -> Any:
    """A member of that kind, or null. Raises LmserveError (400)."""
    if name not in members:
        return None
    try:
        return msgspec.json.decode(members[name], type=kind | None)
    except msgspec.ValidationError as error:
        expected = "a string" if kind is str else "a boolean"
        given = bytes(members[name])[:MAX_QUOTE].decode(errors="replace")
        message = f"{name}: expected {expected}, but {given} was given"
        raise LmserveError.invalid(name, message) from error
