"""Sessions in PostgreSQL, where several servers share them.

A lease is an advisory lock of the server's one connection: it ends with the server, without a clock. A session is a row
with a version, and a row for each of its records; a write is one statement that names the version it follows.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, Final, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from lmserve.engine.session_store import Record, Stored, StoredKey, StoreDownError, Version, stored_info
from lmserve.engine.sessions import SessionId, SessionInfo
from lmserve.errors import LmserveError

logger = logging.getLogger("lmserve.engine")

T = TypeVar("T")
Connection = psycopg.Connection[tuple[Any, ...]]

# Seconds between two deletions of sessions that nobody has used for session_ttl.
PURGE_INTERVAL: Final = 60
# Of a connection: a server or a database that is cut off is noticed within some seconds, so that its leases end.
CONNECTION: Final = {
    "application_name": "lmserve",
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
SETTINGS: Final = """
SET statement_timeout = '10s';
SET lock_timeout = '5s';
SET tcp_keepalives_idle = 5;
SET tcp_keepalives_interval = 2;
SET tcp_keepalives_count = 3;
SET tcp_user_timeout = 10000
"""
# Two servers that start at the same time make the tables one after the other.
MAKING: Final = 0x6C6D7365
SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS lmserve_sessions (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    model bytea NOT NULL,
    tenant bytea NOT NULL,
    id bytea NOT NULL,
    version bigint NOT NULL,
    first bigint NOT NULL,
    last bigint NOT NULL,
    turns bigint NOT NULL,
    tokens bigint NOT NULL,
    used bigint[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    used_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (model, tenant, id)
);
CREATE TABLE IF NOT EXISTS lmserve_records (
    session bigint NOT NULL REFERENCES lmserve_sessions ON DELETE CASCADE,
    number bigint NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (session, number)
)
"""
WHOSE: Final = "model = %(model)s AND tenant = %(tenant)s AND id = %(id)s"
ALIVE: Final = "(%(ttl)s = 0 OR used_at > now() - make_interval(secs => %(ttl)s))"
VERSION: Final = f"SELECT version FROM lmserve_sessions WHERE {WHOSE} AND {ALIVE}"  # noqa: S608 - of constants
LOAD: Final = f"""
SELECT s.version, r.body FROM lmserve_sessions s JOIN lmserve_records r ON r.session = s.key
WHERE {WHOSE} AND {ALIVE} ORDER BY r.number
"""  # noqa: S608 - of constants
# A session whose time is over, and which nobody has deleted yet, is replaced.
INSERT: Final = """
WITH s AS (
    INSERT INTO lmserve_sessions AS s (model, tenant, id, version, first, last, turns, tokens, used)
    VALUES (%(model)s, %(tenant)s, %(id)s, %(after)s, 1, 1, %(turns)s, %(tokens)s, %(used)s)
    ON CONFLICT (model, tenant, id) DO UPDATE
    SET version = %(after)s, first = s.last + 1, last = s.last + 1, turns = %(turns)s, tokens = %(tokens)s,
        used = %(used)s, created_at = now(), used_at = now()
    WHERE %(ttl)s > 0 AND s.used_at <= now() - make_interval(secs => %(ttl)s)
    RETURNING key, first, last
), d AS (DELETE FROM lmserve_records r USING s WHERE r.session = s.key AND r.number < s.first)
INSERT INTO lmserve_records SELECT key, last, %(body)s FROM s RETURNING 1
"""
UPDATE: Final = f"""
WITH s AS (
    UPDATE lmserve_sessions
    SET version = %(after)s, first = CASE WHEN %(whole)s THEN last + 1 ELSE first END, last = last + 1,
        turns = %(turns)s, tokens = %(tokens)s, used = %(used)s, used_at = now()
    WHERE {WHOSE} AND version = %(before)s
    RETURNING key, first, last
), d AS (DELETE FROM lmserve_records r USING s WHERE %(whole)s AND r.session = s.key AND r.number < s.first)
INSERT INTO lmserve_records SELECT key, last, %(body)s FROM s RETURNING 1
"""  # noqa: S608 - of constants
END: Final = f"DELETE FROM lmserve_sessions WHERE {WHOSE} AND version = %(before)s RETURNING 1"  # noqa: S608 - of constants
LIST: Final = f"""
SELECT id, turns, tokens, (extract(epoch FROM created_at) * 1000)::bigint,
    (extract(epoch FROM used_at) * 1000)::bigint, used
FROM lmserve_sessions
WHERE model = %(model)s AND tenant = %(tenant)s AND id > %(id)s AND {ALIVE} ORDER BY id LIMIT %(limit)s
"""  # noqa: S608 - of constants
PURGE: Final = (
    "DELETE FROM lmserve_sessions WHERE model = %(model)s AND used_at <= now() - make_interval(secs => %(ttl)s)"
)


class PostgresStore:
    """A `SessionStore` in a database. One connection, which one thread uses at a time."""

    def __init__(self, url: str, *, fingerprint: bytes, tenants: Mapping[int, bytes], session_ttl: float = 0) -> None:
        """`fingerprint`: of the model; sessions of others are not seen. `tenants`: the name of each, 32 bytes.

        `session_ttl`: seconds after which an unused session is deleted; 0: never.
        Raises LmserveError `session_store_unusable` if the database cannot be used.
        """
        self._url = url
        self._model = fingerprint
        self._tenants = dict(tenants)
        self._ttl = session_ttl
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._purged = 0.0
        try:
            self._conninfo = make_conninfo(**(CONNECTION | _given(url)))
            with self._lock:
                _make_tables(self._connected())
        except psycopg.Error as error:
            message = f"the session store cannot be used: {_first_line(error)}"
            raise LmserveError.new(400, "session_store_unusable", message) from error

    def lease(self, key: StoredKey) -> bool:
        return self._ask(lambda db: bool(_value(db, "SELECT pg_try_advisory_lock(%s)", (self._lease_of(key),))))

    def release(self, key: StoredKey) -> None:
        with self._lock:
            if self._connection is not None:
                self._try(lambda db: _value(db, "SELECT pg_advisory_unlock(%s)", (self._lease_of(key),)))

    def version(self, key: StoredKey) -> int | None:
        row: int | None = self._ask(lambda db: _value(db, VERSION, self._named(key)))
        return row

    def load(self, key: StoredKey) -> Stored | None:
        rows = self._ask(lambda db: db.execute(LOAD, self._named(key)).fetchall())
        return Stored(Version(rows[0][0], len(rows)), [body for _, body in rows]) if rows else None

    def put(self, key: StoredKey, before: Version | None, record: Record) -> Version | None:
        self._purge()
        after = Version(secrets.randbits(63), 1 if record.whole or before is None else before.records + 1)
        values = self._named(key) | {
            "before": None if before is None else before.number,
            "after": after.number,
            "whole": record.whole,
            "turns": record.turns,
            "tokens": record.tokens,
            "used": list(record.used),
            "body": record.body,
        }
        statement = INSERT if before is None else UPDATE
        try:
            with self._lock:
                kept = self._try(lambda db: _value(db, statement, values))
        except StoreDownError:
            # It may have been written all the same. Raises where the store is still down.
            found = self.version(key)
            if found == after.number:
                return after
            if found != (None if before is None else before.number):
                return None
            with self._lock:
                kept = self._try(lambda db: _value(db, statement, values))
        return None if kept is None else after

    def end(self, key: StoredKey, before: Version) -> bool:
        values = self._named(key) | {"before": before.number}
        try:
            with self._lock:
                return self._try(lambda db: _value(db, END, values)) is not None
        except StoreDownError:
            found = self.version(key)
            if found is not None and found != before.number:
                return False
            with self._lock:
                self._try(lambda db: _value(db, END, values))
            return True

    def list(self, tenant: int, after: SessionId | None, limit: int) -> list[SessionInfo]:
        values = self._named(StoredKey(tenant, 0)) | {"id": b"" if after is None else _bytes_of(after), "limit": limit}
        rows = self._ask(lambda db: db.execute(LIST, values).fetchall())
        return [stored_info(_id_of(name), *numbers) for name, *numbers in rows]

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    def _named(self, key: StoredKey) -> dict[str, Any]:
        return {"model": self._model, "tenant": self._tenants[key.tenant], "id": _bytes_of(key.id), "ttl": self._ttl}

    def _lease_of(self, key: StoredKey) -> int:
        digest = blake2b(self._model + self._tenants[key.tenant] + _bytes_of(key.id), digest_size=8)
        return int.from_bytes(digest.digest(), signed=True)

    def _ask(self, work: Callable[[Connection], T]) -> T:
        """Do what may be done twice: once more, if the connection was lost meanwhile."""
        with self._lock:
            was_connected = self._connection is not None
            try:
                return self._try(work)
            except StoreDownError:
                if not was_connected or self._connection is not None:
                    raise
                return self._try(work)

    def _try(self, work: Callable[[Connection], T]) -> T:
        """Within the lock. Raises StoreDownError."""
        try:
            return work(self._connected())
        except psycopg.Error as error:
            connection = self._connection
            if connection is None or connection.closed:
                self._disconnect()
                why = "the database gives no connection"
            else:
                why = f"the database refused ({type(error).__name__})"
            # Clients need not know where the database is.
            logger.warning("the session store: %s: %s", why, _first_line(error))
            raise StoreDownError(why) from error

    def _connected(self) -> Connection:
        if self._connection is None:
            connection = psycopg.connect(self._conninfo, autocommit=True)
            try:
                connection.execute(SETTINGS)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _purge(self) -> None:
        if self._ttl == 0 or time.monotonic() < self._purged + PURGE_INTERVAL:
            return
        self._purged = time.monotonic()
        with self._lock:
            self._try(lambda db: db.execute(PURGE, {"model": self._model, "ttl": self._ttl}))


def _make_tables(connection: Connection) -> None:
    tables = "SELECT count(to_regclass(name)) FROM unnest(ARRAY['lmserve_sessions', 'lmserve_records']) AS name"
    connection.execute("SELECT pg_advisory_lock(%s)", (MAKING,))
    try:
        # A role that may make no tables can use those that another has made.
        if _value(connection, tables, ()) < 2:
            connection.execute(SCHEMA)
    finally:
        connection.execute("SELECT pg_advisory_unlock(%s)", (MAKING,))


def _value(connection: Connection, statement: str, values: Any) -> Any:
    """The first value of the first row; None: there is no row."""
    row = connection.execute(statement, values).fetchone()
    return None if row is None else row[0]


def _bytes_of(session_id: SessionId) -> bytes:
    """In the order of the ids: numbers, then names."""
    if isinstance(session_id, int):
        return b"\0" + session_id.to_bytes(8)
    return b"\1" + session_id.encode(errors="surrogatepass")


def _id_of(name: bytes) -> SessionId:
    return int.from_bytes(name[1:]) if name[:1] == b"\0" else name[1:].decode(errors="surrogatepass")


def _given(url: str) -> dict[str, str]:
    return {name: str(value) for name, value in conninfo_to_dict(url).items() if value is not None}


def _first_line(error: psycopg.Error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
