"""The end of a response: the server stores it first and tells the client afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import msgspec

from lmserve.api.convert.response_items import answered_items
from lmserve.api.responses.events import ResponseEvents
from lmserve.api.responses.store import ResponseStore, session_of
from lmserve.api.state.conversations import OpenTurn, Tip, Turn
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.stream import AsyncStream
from lmserve.errors import LmserveError
from lmserve.schemas.response_reply import OutputItem, StoredItem

ENDS: Final = (b"event: response.completed\n", b"event: response.incomplete\n")
FAILED: Final = b"event: response.failed\n"


class _Output(msgspec.Struct):
    """The part of a response that its conversation keeps."""

    output: list[OutputItem]


class _LastEvent(msgspec.Struct):
    """The part of a stream's last event that is kept."""

    response: msgspec.Raw


class _Numbered(msgspec.Struct):
    """The part of an event that orders it."""

    sequence_number: int


@dataclass(frozen=True, slots=True)
class Said:
    """What was asked in a conversation."""

    open_turn: OpenTurn
    engine: AsyncEngine
    instructions: str | None  # in force
    items: Sequence[StoredItem]
    stored: bool  # as a response of its own

    async def answered(self, tenant: int, response_id: str, body: bytes) -> None:
        """Add it and the answer to the conversation. Raises LmserveError (503, 507)."""
        output = msgspec.json.decode(body, type=_Output).output
        tip = Tip(response_id, self.stored)
        turn = Turn(self.instructions, tip, [*self.items, *answered_items(output)])
        await end_tip(self.engine, tenant, await self.open_turn.commit(turn, body))


async def end_tip(engine: AsyncEngine, tenant: int, tip: Tip | None) -> None:
    """End the session of a tip from which no conversation continues, unless it is a stored response's."""
    if tip is not None and not tip.stored:
        await engine.end_session(tenant, session_of(tip.response_id))


class Outcome:
    """Keeps a response at its end, once."""

    def __init__(
        self,
        store: ResponseStore | None,
        tenant: int,
        response_id: str,
        said: Said | None,
        give_up: Callable[[], None],
    ) -> None:
        """`store`: where it was begun; None: it is not stored. `said`: in its conversation. `give_up`: its session."""
        self._store = store
        self._key = (tenant, response_id)
        self._said = said
        self._give_up = give_up

    async def keep(self, body: bytes) -> None:
        """It was answered. Raises LmserveError (503, 507) where its conversation cannot be written."""
        said, self._said = self._said, None
        if said is not None:
            try:
                await said.answered(*self._key, body)
            except BaseException:
                self.fail(None)
                raise
        self._end(body)
        if self._store is not None:
            await self._store.settled()

    def fail(self, body: bytes | None) -> None:
        """It was not answered; `body`: the response that says so, None: it is not kept. Does nothing after an end."""
        said, self._said = self._said, None
        if said is not None:
            said.open_turn.release()
        self._end(body)
        if body is None:
            # The core may have committed the turn before the client left.
            self._give_up()

    def _end(self, body: bytes | None) -> None:
        store = self._store
        if store is not None:
            store.end(*self._key, body)


class RecordedResponse:
    """The core's reply on its way to the client, kept at its end. One that does not get there is not kept."""

    def __init__(self, stream: AsyncStream, outcome: Outcome) -> None:
        self._stream = stream
        self._outcome: Outcome | None = outcome
        self._failed = False
        self.kept = False  # it was answered, and all is written down
        self.ended = False  # whether the piece that was returned last was the final one

    @property
    def aborted(self) -> bool:
        """Whether `abort` came before the reply's end."""
        return self._stream.aborted

    async def opened(self) -> None:
        """As `AsyncStream.opened`."""
        await self._stream.opened()

    async def body(self) -> bytes:
        """As `AsyncStream.body`."""
        body = await self._stream.body()
        await self._keep(body)
        return body

    def chunks(self) -> Self:
        """As `AsyncStream.chunks`."""
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._failed:
            raise StopAsyncIteration
        try:
            events = await anext(self._stream)
        except StopAsyncIteration:
            self._lose()
            raise
        self.ended = _last_of(events).startswith((*ENDS, FAILED))
        if (response := response_at_end_of(events)) is not None:
            # The client hears of the end once it is kept.
            try:
                await self._keep(response)
            except LmserveError as error:
                self._failed = True
                return _error_event(events, error)
        return events

    def abort(self) -> None:
        """Stop the request. Does nothing after the reply's end. Idempotent."""
        self._stream.abort()
        # Nothing, where the outcome is there already.
        self._lose()

    async def _keep(self, body: bytes) -> None:
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            await outcome.keep(body)
            self.kept = True

    def _lose(self) -> None:
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            outcome.fail(None)


async def recorded(stream: AsyncStream, events: ResponseEvents) -> tuple[bytes | None, bytes]:
    """Read `stream` into `events` up to its last piece; the response that this one has, and the piece."""
    await stream.opened()
    async for chunk in stream.chunks():
        response = response_at_end_of(chunk, (*ENDS, FAILED))
        if response is not None:
            return response, chunk
        events.add(chunk)
    return None, b""


def response_at_end_of(events: bytes, ends: tuple[bytes, ...] = ENDS) -> bytes | None:
    """The response where the last event is one of `ends`; after a failure there is no turn to go on from."""
    last = _last_of(events)
    if not last.startswith(ends):
        return None
    _, _, data = last.partition(b"\ndata: ")
    return bytes(msgspec.json.decode(data, type=_LastEvent).response)


def ends_well(events: bytes) -> bool:
    """Whether the last event is that of an answer."""
    return _last_of(events).startswith(ENDS)


def _last_of(events: bytes) -> bytes:
    return events[events.rfind(b"\nevent: ") + 1 :]


def _error_event(events: bytes, error: LmserveError) -> bytes:
    """The events with another one for the last, where the response could not be kept."""
    last = _last_of(events)
    _, _, data = last.partition(b"\ndata: ")
    number = msgspec.json.decode(data, type=_Numbered).sequence_number
    told = {"type": "error", "sequence_number": number, "code": error.code, "message": str(error), "param": None}
    return events.removesuffix(last) + b"event: error\ndata: " + msgspec.json.encode(told) + b"\n\n"
