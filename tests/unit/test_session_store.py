"""Settings of the shared session store, and who may change a session when."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
from lmserve.config import ConfigError, ServeConfig
from lmserve.engine.session_store import (
    Record,
    SharedSessions,
    Stored,
    StoredKey,
    StoreDownError,
    Version,
    is_shared,
)
from lmserve.errors import LmserveError

URL = "postgresql://lmserve:secret@127.0.0.1/lmserve"
KEY = StoredKey(0, "a")
RECORD = (True, 1, 3, (1, 0, 1, 1, 5), b"body")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"session_store": "mysql://secret@host"}, "postgresql://"),
        ({"session_store": URL, "session_dir": "x"}, "--session-dir"),
        ({"session_store": URL, "models": (("a", "b"),)}, "several models"),
        ({"session_store": URL, "idle_unload": 5.0}, "--idle-unload"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_the_password(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        ServeConfig(**settings)
    assert "secret" not in str(refused.value)
    assert "secret" not in repr(ServeConfig(session_store=URL))


def test_a_database_that_is_not_there_is_named_at_the_start() -> None:
    postgres = pytest.importorskip("lmserve.engine.postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"postgresql://lmserve:secret@127.0.0.1:{free.getsockname()[1]}/lmserve"
        with pytest.raises(LmserveError, match="the session store cannot be used") as refused:
            postgres.PostgresStore(url, fingerprint=bytes(32), tenants={0: bytes(32)})
    assert refused.value.code == "session_store_unusable"
    assert "secret" not in str(refused.value)


class Core:
    """The sessions of one server, as the core has them."""

    def __init__(self, shared: SharedSessions) -> None:
        self._shared = shared
        self.sessions: dict[Any, list[bytes]] = {}
        shared.attach(self)  # type: ignore[arg-type]

    def session_info(self, tenant: int, name: Any) -> dict[str, Any]:
        if name not in self.sessions:
            raise LmserveError.new(404, "session_not_found", "there is none")
        return {}

    def restore_session(self, tenant: int, name: Any, records: list[bytes]) -> None:
        # As a thread of the core writes what has changed.
        assert self._shared.write([(tenant, name, RECORD)]) == [("kept", "")]
        self.sessions[name] = records

    def end_session(self, tenant: int, name: Any, cancel: bool) -> bool:
        assert self._shared.write([(tenant, name, None)]) == [("kept", "")]
        return self.sessions.pop(name, None) is not None


class Store:
    """One database, as a server sees it."""

    def __init__(self) -> None:
        self.leases: set[StoredKey] = set()
        self.stored: dict[StoredKey, Stored] = {}
        self.down = False
        self.writes = 0

    def _check(self) -> None:
        if self.down:
            raise StoreDownError("it is down")

    def lease(self, key: StoredKey) -> bool:
        self._check()
        free = key not in self.leases
        self.leases.add(key)
        return free

    def release(self, key: StoredKey) -> None:
        self._check()
        self.leases.remove(key)

    def version(self, key: StoredKey) -> int | None:
        self._check()
        return self.stored[key].version.number if key in self.stored else None

    def load(self, key: StoredKey) -> Stored | None:
        return self.stored.get(key)

    def put(self, key: StoredKey, before: Version | None, record: Record) -> Version | None:
        self._check()
        if self.version(key) != (None if before is None else before.number):
            return None
        self.writes += 1
        version = Version(self.writes, 1)
        self.stored[key] = Stored(version, [record.body])
        return version

    def end(self, key: StoredKey, before: Version) -> bool:
        self._check()
        if self.version(key) != before.number:
            return False
        del self.stored[key]
        return True


def server(store: Store) -> tuple[SharedSessions, Core]:
    shared = SharedSessions(store)  # type: ignore[arg-type]
    return shared, Core(shared)


def test_a_session_is_taken_once_and_free_after_its_write() -> None:
    store = Store()
    (one, core), (other, _) = server(store), server(store)
    use = one.take(KEY)
    for shared in (one, other):
        with pytest.raises(LmserveError, match="already running a turn") as refused:
            shared.take(KEY)
        assert (refused.value.status, refused.value.retry_after) == (409, 1)
    assert one.write([(0, "a", RECORD)]) == [("kept", "")]
    core.sessions["a"] = [b"body"]
    # Its client may go on elsewhere, before the reply was read to its end.
    later = other.take(KEY)
    one.release(use)
    with pytest.raises(LmserveError):
        one.take(KEY)
    other.release(later)
    one.release(one.take(KEY))
    assert not store.leases


def test_a_copy_that_is_out_of_date_is_replaced_and_one_that_has_ended_is_dropped() -> None:
    store = Store()
    (one, core), (other, far) = server(store), server(store)
    one.take(KEY)
    one.write([(0, "a", RECORD)])
    core.sessions["a"] = [b"body"]
    use = other.take(KEY)
    assert far.sessions["a"] == [b"body"]
    other.write([(0, "a", (*RECORD[:4], b"newer"))])
    other.release(use)
    one.refresh(KEY)
    assert core.sessions["a"] == [b"newer"]
    assert one.counters.loads == 1
    one.refresh(KEY)
    assert one.counters.loads == 1
    other.take(KEY)
    assert other.write([(0, "a", None)]) == [("kept", "")]
    one.refresh(KEY)
    assert "a" not in core.sessions


def test_a_write_without_its_session_or_of_an_old_version_is_overtaken() -> None:
    store = Store()
    (one, core), (other, _) = server(store), server(store)
    assert one.write([(0, "a", RECORD)]) == [("overtaken", "")]
    use = one.take(KEY)
    # Its connection was lost, and with it the lease.
    store.leases.clear()
    late = other.take(KEY)
    assert other.write([(0, "a", RECORD)]) == [("kept", "")]
    other.release(late)
    assert one.write([(0, "a", RECORD), (0, "b", RECORD)]) == [("overtaken", ""), ("overtaken", "")]
    assert store.writes == 1
    store.leases.add(KEY)
    one.release(use)
    assert "a" not in core.sessions


def test_a_difference_without_a_session_to_follow_is_wanted_whole() -> None:
    shared, _ = server(Store())
    shared.take(KEY)
    assert shared.write([(0, "a", (False, *RECORD[1:]))]) == [("whole", "")]
    assert shared.write([(0, "a", RECORD)]) == [("kept", "")]


def test_a_store_that_is_down_says_so_and_leaves_the_session_free() -> None:
    store = Store()
    shared, _ = server(store)
    use = shared.take(KEY)
    store.down = True
    assert shared.write([(0, "a", RECORD)]) == [("failed", "it is down")]
    assert shared.probe() == "it is down"
    shared.release(use)
    for ask in (shared.take, shared.refresh):
        with pytest.raises(StoreDownError, match="the session is unchanged") as refused:
            ask(KEY)
        assert (refused.value.status, refused.value.code) == (503, "storage_failed")
    store.down = False
    store.leases.clear()
    assert shared.probe() is None
    shared.release(shared.take(KEY))


def test_what_reads_a_session_waits_for_nothing_while_its_turn_runs() -> None:
    shared, _ = server(Store())
    use = shared.take(KEY)
    reader = threading.Thread(target=shared.refresh, args=(KEY,))
    reader.start()
    reader.join(30)
    assert not reader.is_alive()
    shared.release(use)


def test_the_servers_own_sessions_are_not_shared() -> None:
    assert [is_shared(name) for name in (0, 7, "a", "-5", -2)] == [True, True, True, True, False]
