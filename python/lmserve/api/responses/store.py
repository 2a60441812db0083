"""The stored responses of `/v1/responses`: the request and the outcome of each.

The tokens of a stored response are a session of the core; the response's id determines which. Clients name sessions by
numbers from 0 on, so negative numbers are free for these sessions.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import msgspec

from lmserve.api.responses.events import ResponseEvents
from lmserve.api.responses.log import Remembered, ResponseLog
from lmserve.engine.sessions import Fsync, StorageFault
from lmserve.errors import LmserveError
from lmserve.schemas.response_reply import StoredItem

MAX_RESPONSES: Final = 10_000
MAX_BYTES: Final = 268_435_456  # of the texts that are kept
MAX_EVENT_BYTES: Final = 67_108_864  # of the events of responses that have ended

ID_BITS: Final = 62
RESPONSE_ID: Final = re.compile("resp_([0-3][0-9a-f]{15})")
FIRST_SESSION: Final = -2
SYNC_INTERVAL: Final = 1.0  # seconds
HEAL_INTERVAL: Final = 1.0  # seconds between two tries of a disk that fails


def new_response_id(turn_key: str | None = None) -> str:
    """An id that cannot be guessed; for a turn that has a name, always the same one."""
    bits = secrets.randbits(ID_BITS) if turn_key is None else int(turn_key, 16) & ((1 << ID_BITS) - 1)
    return f"resp_{bits:016x}"


def session_of(response_id: str, param: str = "response_id") -> int:
    """The session that holds a response's tokens. Raises LmserveError (404) for what is no response's id."""
    match = RESPONSE_ID.fullmatch(response_id)
    if match is None:
        raise no_response(response_id, param)
    return FIRST_SESSION - int(match[1], 16)


def ended_by_restart(body: bytes) -> bytes:
    """A response that ran when the server ended has failed; others are as they were."""
    if b'"status":"in_progress"' not in body:
        return body
    response = msgspec.json.decode(body)
    if response["status"] != "in_progress":
        return body
    error = {"code": "server_error", "message": "the server stopped while the response was running"}
    return msgspec.json.encode({**response, "status": "failed", "error": error})


def no_response(response_id: str, param: str = "response_id") -> LmserveError:
    code = "previous_response_not_found" if param == "previous_response_id" else "response_not_found"
    message = (
        f"there is no stored response {response_id!r}; it was never stored, or it was deleted, by a "
        "client or to make room"
    )
    return LmserveError.new(404, code, message, param=param)


class _Link(msgspec.Struct):
    """The part of a response that says from which response it continues."""

    previous_response_id: str | None


class StoredResponse:
    """A response, from when it begins to run."""

    def __init__(
        self,
        *,
        instructions: str | None,
        items: Sequence[StoredItem],
        body: bytes,
        events: ResponseEvents | None = None,
    ) -> None:
        """`instructions`: those in force in the conversation. `body`: the response's JSON as it stands.

        `events`: where it was asked for in the background as a stream.
        """
        self.events = events
        self.instructions = instructions
        self.items = items
        self.body = body
        self.ended = asyncio.Event()
        self._fixed_size = len(msgspec.json.encode(items)) + len(instructions or "")

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return self._fixed_size + len(self.body)


class ResponseStore:
    """Stored responses by tenant and id, within a number and a size: the longest unused go first."""

    def __init__(
        self,
        log: ResponseLog | None = None,
        fsync: Fsync = "interval",
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        max_event_bytes: int = MAX_EVENT_BYTES,
    ) -> None:
        """`log`: where they are written down at their end, and when that is made safe: see `SessionLog`."""
        self._log = log
        self._fsync = fsync
        self._writer: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None
        self._sync_due: asyncio.TimerHandle | None = None
        self._heal_due: asyncio.TimerHandle | None = None
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._responses: OrderedDict[tuple[int, str], StoredResponse] = OrderedDict()
        self._bytes = 0
        self._max_event_bytes = max_event_bytes
        self._replayable: OrderedDict[tuple[int, str], int] = OrderedDict()  # bytes of the events of those that ended
        self._event_bytes = 0

    def restore(self) -> int:
        """Take what the log has. Blocks; before the first request. Raises LmserveError if it cannot be read."""
        if self._log is None:
            return 0
        for tenant, kept in self._log.open(self._remembered):
            body = ended_by_restart(bytes(kept.body))
            response = StoredResponse(instructions=kept.instructions, items=kept.items, body=body)
            response.ended.set()
            self.begin(tenant, kept.id, response)
        # One thread: what is written is written in order.
        self._writer = ThreadPoolExecutor(1, "lmserve-responses")
        return len(self._responses)

    async def settled(self) -> None:
        """Wait until all outcomes so far are written down, and made safe where that must be first."""
        if self._written is not None:
            await asyncio.wrap_future(self._written)

    async def close(self) -> None:
        """Nothing is written down any more."""
        writer, log, self._writer = self._writer, self._log, None
        if writer is not None and log is not None:
            for due in (self._sync_due, self._heal_due):
                if due is not None:
                    due.cancel()
            await asyncio.wrap_future(writer.submit(log.close))
            writer.shutdown()

    def begin(self, tenant: int, response_id: str, response: StoredResponse) -> None:
        """Keep a response that begins to run."""
        self._responses[tenant, response_id] = response
        self._bytes += response.size
        self._make_room()

    def write_down(self, tenant: int, response_id: str) -> None:
        """Let a response that runs outlive the server, as one that has failed: its client was told of it."""
        response = self._responses.get((tenant, response_id))
        if response is not None and self._log is not None:
            self._write(
                self._log.append, tenant, response_id, response.instructions, list(response.items), response.body
            )

    def end(self, tenant: int, response_id: str, body: bytes | None) -> None:
        """Its outcome; None: there is none, and it is not kept."""
        response = self._responses.get((tenant, response_id))
        if response is None:
            return
        if body is None:
            self.drop(tenant, response_id)
        else:
            self._bytes += len(body) - len(response.body)
            response.body = body
            response.ended.set()
            if self._log is not None:
                self._write(self._log.append, tenant, response_id, response.instructions, list(response.items), body)
            if response.events is not None:
                self._keep_events((tenant, response_id), response.events.size)
            self._make_room()
        response.ended.set()

    def get(self, tenant: int, response_id: str) -> StoredResponse | None:
        """The response, which thereby counts as used."""
        response = self._responses.get((tenant, response_id))
        if response is not None:
            self._responses.move_to_end((tenant, response_id))
        return response

    def conversation(self, tenant: int, response_id: str | None) -> list[StoredItem]:
        """What was asked from the conversation's begin up to a response, as far as its responses are kept."""
        links: list[Sequence[StoredItem]] = []
        while response_id is not None and (response := self._responses.get((tenant, response_id))) is not None:
            links.append(response.items)
            response_id = msgspec.json.decode(response.body, type=_Link).previous_response_id
        return [item for items in reversed(links) for item in items]

    def drop(self, tenant: int, response_id: str) -> bool:
        """Forget it. False: there was none."""
        response = self._responses.pop((tenant, response_id), None)
        if response is None:
            return False
        self._bytes -= response.size
        self._event_bytes -= self._replayable.pop((tenant, response_id), 0)
        response.ended.set()
        if self._log is not None:
            self._write(self._log.drop, tenant, response_id)
        return True

    @property
    def storage_fault(self) -> StorageFault | None:
        """Why responses cannot be written down now; None: nothing is wrong, or they are kept in memory alone."""
        return None if self._log is None else self._log.fault

    def _remembered(self) -> list[Remembered]:
        ended = [(key, response) for key, response in list(self._responses.items()) if response.ended.is_set()]
        return [(*key, kept.instructions, list(kept.items), kept.body) for key, kept in ended]

    def _write(self, write: Callable[..., None], *args: Any) -> None:
        log, always = self._log, self._fsync == "always"
        if self._writer is None or log is None:
            return

        def work() -> None:
            write(*args)
            if always:
                log.sync()
            if log.fault is not None:
                loop.call_soon_threadsafe(self._heal_later)

        loop = asyncio.get_running_loop()
        self._written = self._writer.submit(work)
        if self._fsync == "interval" and self._sync_due is None:
            self._sync_due = loop.call_later(SYNC_INTERVAL, self._sync)

    def _sync(self) -> None:
        self._sync_due = None
        if self._writer is not None and self._log is not None:
            self._writer.submit(self._log.sync)

    def _heal_later(self) -> None:
        """Try a disk that failed again, until it is well."""
        if self._heal_due is None and self._writer is not None:
            self._heal_due = asyncio.get_running_loop().call_later(HEAL_INTERVAL, self._heal)

    def _heal(self) -> None:
        self._heal_due = None
        loop = asyncio.get_running_loop()

        def work(log: ResponseLog) -> None:
            if not log.heal():
                loop.call_soon_threadsafe(self._heal_later)

        if self._writer is not None and self._log is not None:
            self._writer.submit(work, self._log)

    def _keep_events(self, key: tuple[int, str], size: int) -> None:
        self._replayable[key] = size
        self._event_bytes += size
        while self._event_bytes > self._max_event_bytes:
            oldest, given_up = self._replayable.popitem(last=False)
            self._event_bytes -= given_up
            response = self._responses[oldest]
            if response.events is not None:
                response.events.forget()
                response.events = None

    def _make_room(self) -> None:
        while len(self._responses) > self._max_responses or (
            self._bytes > self._max_bytes and len(self._responses) > 1
        ):
            self.drop(*next(iter(self._responses)))
