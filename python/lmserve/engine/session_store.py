"""Sessions that several servers share: what a store must do, and who may change a session when.

A server takes a session before it runs a turn: it leases it, so that no other server runs a turn of it, and brings its
own copy up to date. The core's thread then writes the turn before its reply ends. A write names the version that it
follows, so even a server whose lease was lost can never undo what another has written.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from lmserve.engine.core import CoreEngine
from lmserve.engine.sessions import SessionId, SessionInfo, SessionUsage
from lmserve.errors import LmserveError

# Sessions whose version in the store is remembered. One that is forgotten is loaded again before its next turn.
MOST_VERSIONS: Final = 200_000
# Records that a session may have beyond two for each of its turns, before it is written whole.
SPARE_RECORDS: Final = 64


class StoreDownError(LmserveError):
    """503: the store cannot be asked now."""

    def __init__(self, why: str) -> None:
        message = f"the session store cannot be reached: {why}; the session is unchanged"
        error = LmserveError.new(503, "storage_failed", message, retry_after=5)
        super().__init__(error.status, error.error)
        self.why = why


class StoredKey(NamedTuple):
    """A session of a tenant."""

    tenant: int
    id: SessionId


class Version(NamedTuple):
    """How a session is in the store."""

    number: int  # random: no two states of sessions have the same
    records: int  # that make it


class Record(NamedTuple):
    """What a turn made of its session, as the core gives it."""

    whole: bool  # all of the session; else the difference to the version before
    turns: int  # of the session then
    tokens: int
    used: tuple[int, int, int, int, int]  # the members of `SessionUsage`
    body: bytes


class Stored(NamedTuple):
    """A session as the store has it."""

    version: Version
    records: list[bytes]  # the oldest first


class SessionStore(Protocol):
    """A store that several servers share. For any thread; everything may block, and raises StoreDownError."""

    def lease(self, key: StoredKey) -> bool:
        """Lease the session; False: another server has it. Its server's death ends the lease."""

    def release(self, key: StoredKey) -> None:
        """End the lease. Does nothing where there is none."""

    def version(self, key: StoredKey) -> int | None:
        """The number of the session's version; None: there is no such session."""

    def load(self, key: StoredKey) -> Stored | None:
        """The session; None: there is none."""

    def put(self, key: StoredKey, before: Version | None, record: Record) -> Version | None:
        """Write what follows the version `before` (None: nothing). None: the store keeps another version."""

    def end(self, key: StoredKey, before: Version) -> bool:
        """Remove the session of this version. False: the store keeps another version."""

    def list(self, tenant: int, after: SessionId | None, limit: int) -> list[SessionInfo]:
        """At most `limit` sessions of a tenant after id `after`, in order of their ids: numbers, then names."""

    def close(self) -> None:
        """End all leases. Idempotent."""


@dataclass(slots=True)
class Use:
    """One use of a session, by one request."""

    key: StoredKey
    turn: bool  # may change the session; else it is only brought up to date
    before: Version | None = None
    leased: bool = False
    loading: bool = False  # what the core writes now came from the store


@dataclass(slots=True)
class StoreCounters:
    """What was asked of the store since the start."""

    loads: int = 0
    loaded_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    refused: int = 0  # turns of sessions that another request had, here or elsewhere


class SharedSessions:
    """The sessions of one server that shares them with others. For any thread; only `drop` never blocks."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self.counters = StoreCounters()
        self._core: CoreEngine | None = None
        self._uses: dict[StoredKey, Use] = {}
        self._changed = threading.Condition()
        # Versions of what the core has.
        self._held: OrderedDict[StoredKey, Version] = OrderedDict()

    def attach(self, core: CoreEngine) -> None:
        """Say whose sessions they are; before anything else."""
        self._core = core

    def take(self, key: StoredKey) -> Use:
        """Lease a session for one change, and bring the core's copy up to date; `release` must follow.

        The change ends the use, too: its client may go on before the reply was read to its end.

        Raises LmserveError: 409 `session_busy` while another turn runs, here or elsewhere; 503 `storage_failed`; what
        the core says of a session that it cannot take.
        """
        use = self._enter(key, turn=True)
        if use is None:
            raise self._busy(key)
        try:
            use.leased = self.store.lease(key)
            if not use.leased:
                raise self._busy(key)  # noqa: TRY301 - released below
            self._update(key, use)
        except BaseException:
            self.release(use)
            raise
        return use

    def drop(self, use: Use) -> bool:
        """Let others here use the session. True: its lease is still to be ended. Never blocks; may be called again."""
        with self._changed:
            if self._uses.get(use.key) is use:
                del self._uses[use.key]
                self._changed.notify_all()
        return use.leased

    def release(self, use: Use) -> None:
        """End a use."""
        if self.drop(use):
            self.end_lease(use)

    def end_lease(self, use: Use) -> None:
        """End the lease of a session that was dropped."""
        use.leased = False
        try:
            self.store.release(use.key)
        except StoreDownError:
            # The lease has ended with the connection.
            return

    def refresh(self, key: StoredKey) -> None:
        """Bring the core's copy of a session up to date, to be read. Raises LmserveError (503)."""
        use = self._enter(key, turn=False)
        if use is None:
            return
        try:
            self._update(key, use)
        except LmserveError as error:
            # A turn whose client has left may still be ending here: then this is the newest state.
            if error.code != "session_busy":
                raise
        finally:
            self.drop(use)

    def write(self, changes: Sequence[tuple[int, SessionId, tuple[object, ...] | None]]) -> list[tuple[str, str]]:
        """See `SessionWriter`."""
        return [
            self._written(StoredKey(tenant, name), None if record is None else Record(*record))  # type: ignore[arg-type]
            for tenant, name, record in changes
        ]

    def probe(self) -> str | None:
        """See `SessionWriter`."""
        try:
            self.store.version(StoredKey(0, 0))
        except StoreDownError as down:
            return down.why
        return None

    def _written(self, key: StoredKey, record: Record | None) -> tuple[str, str]:
        use = self._uses.get(key)
        if use is None:
            return "overtaken", ""
        if use.loading:
            return "kept", ""
        try:
            kept = self._put(key, use, record)
        except StoreDownError as down:
            return "failed", down.why
        if kept == "kept":
            # Before the reply ends: its client may send the next turn to another server.
            self.release(use)
        return kept, ""

    def _put(self, key: StoredKey, use: Use, record: Record | None) -> str:
        before = use.before
        if record is None:
            if before is not None and not self.store.end(key, before):
                return "overtaken"
            use.before = None
            self._held.pop(key, None)
            return "kept"
        records = 0 if before is None else before.records
        if not record.whole and (before is None or records > 2 * record.turns + SPARE_RECORDS):
            return "whole"
        after = self.store.put(key, before, record)
        if after is None:
            return "overtaken"
        self.counters.writes += 1
        self.counters.written_bytes += len(record.body)
        use.before = after
        self._hold(key, after)
        return "kept"

    def _enter(self, key: StoredKey, *, turn: bool) -> Use | None:
        """None: a turn runs here."""
        with self._changed:
            while (other := self._uses.get(key)) is not None:
                if other.turn:
                    return None
                self._changed.wait()
            use = self._uses[key] = Use(key, turn)
            return use

    def _update(self, key: StoredKey, use: Use) -> None:
        """Make the core's copy that of the store."""
        core, held = self._core, self._held.get(key)
        if core is None:
            raise RuntimeError("no core was attached")
        here, number = _has(core, key), self.store.version(key)
        if here and number is not None and held is not None and held.number == number:
            use.before = held
            return
        stored = None if number is None else self.store.load(key)
        use.loading = True
        try:
            if stored is not None:
                core.restore_session(key.tenant, key.id, stored.records)
            elif here:
                core.end_session(key.tenant, key.id, False)
        finally:
            use.loading = False
        if stored is None:
            self._held.pop(key, None)
            return
        self.counters.loads += 1
        self.counters.loaded_bytes += sum(map(len, stored.records))
        use.before = stored.version
        self._hold(key, stored.version)

    def _hold(self, key: StoredKey, version: Version) -> None:
        self._held[key] = version
        self._held.move_to_end(key)
        if len(self._held) > MOST_VERSIONS:
            self._held.popitem(last=False)

    def _busy(self, key: StoredKey) -> LmserveError:
        self.counters.refused += 1
        message = f"session {key.id} is already running a turn; a session runs one turn at a time"
        return LmserveError.new(409, "session_busy", message, param="instance_id", retry_after=1)


def _has(core: CoreEngine, key: StoredKey) -> bool:
    try:
        core.session_info(key.tenant, key.id)
    except LmserveError as error:
        if error.status != 404:
            raise
        return False
    return True


def is_shared(session_id: SessionId) -> bool:
    """Whether a session is stored for others, too. Negative numbers are the server's own: no client names them."""
    return isinstance(session_id, str) or session_id >= 0


def stored_info(
    session_id: SessionId, turns: int, tokens: int, created_ms: int, used_ms: int, used: Sequence[int]
) -> SessionInfo:
    """What a store says of a session in a list."""
    return SessionInfo(
        id=session_id,
        turns=turns,
        tokens=tokens,
        busy=False,
        created_ms=created_ms,
        used_ms=used_ms,
        usage=SessionUsage(*used),
    )
