"""A SQLite database that one thread uses: in memory, or in a file beside the session log.

A change is one transaction: after a kill it is there as a whole or not at all. With the write-ahead log, the system has
the data when the transaction ends, so the death of the process loses nothing. `fsync` says what a power loss may lose.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar

from lmserve.engine.sessions import Fsync, StorageFault
from lmserve.errors import LmserveError

logger = logging.getLogger("lmserve.http")

NAME: Final = "state.db"
MAX_QUOTE: Final = 64  # characters of an id in an error
VERSION: Final = 1  # of the tables
SYNCHRONOUS: Final[Mapping[Fsync, str]] = {"always": "FULL", "interval": "NORMAL", "never": "OFF"}

T = TypeVar("T")

TABLES: Final = """
CREATE TABLE IF NOT EXISTS conversations (
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    created INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    instructions TEXT,
    tip TEXT,
    tip_stored INTEGER NOT NULL DEFAULT 1,
    tip_item INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant, id)
);
CREATE TABLE IF NOT EXISTS items (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    conversation TEXT NOT NULL,
    id TEXT NOT NULL,
    body BLOB NOT NULL,
    UNIQUE (tenant, conversation, id),
    FOREIGN KEY (tenant, conversation) REFERENCES conversations (tenant, id) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS items_in_order ON items (tenant, conversation, number);
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    created INTEGER NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    content BLOB,
    batch TEXT,
    failed INTEGER NOT NULL DEFAULT 0,
    UNIQUE (tenant, id)
);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file TEXT NOT NULL,
    metadata TEXT NOT NULL,
    errors BLOB,
    status TEXT NOT NULL,
    output_file TEXT,
    error_file TEXT,
    created INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    cancelling INTEGER,
    ended INTEGER,
    UNIQUE (tenant, id)
);
CREATE TABLE IF NOT EXISTS lines (
    tenant TEXT NOT NULL,
    batch TEXT NOT NULL,
    number INTEGER NOT NULL,
    custom_id TEXT NOT NULL,
    body BLOB NOT NULL,
    failed INTEGER,
    reply BLOB,
    PRIMARY KEY (tenant, batch, number),
    FOREIGN KEY (tenant, batch) REFERENCES batches (tenant, id) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS lines_without_answer ON lines (tenant, batch, number) WHERE failed IS NULL;
"""


class Database:
    """The connection, and its thread. Nothing is opened before the first use."""

    def __init__(self, folder: Path | None, tenants: Mapping[int, bytes], fsync: Fsync = "interval") -> None:
        """`folder`: the session log's, which belongs to this server; None: in memory alone.

        `tenants`: their names for good, by number.
        """
        self.fault: StorageFault | None = None  # why nothing could be written when it was last tried
        self._path = None if folder is None else folder / NAME
        self._names = {number: name.hex() for number, name in tenants.items()}
        self._numbers = {name: number for number, name in self._names.items()}
        self._fsync = fsync
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None

    def name_of(self, tenant: int) -> str:
        """What the tables call a tenant."""
        return self._names[tenant]

    def tenant_of(self, name: str) -> int | None:
        """The tenant of that name; None: it has no key any more."""
        return self._numbers.get(name)

    def open(self) -> None:
        """Open the file. Blocks. Raises LmserveError if it cannot be used."""
        self._on_thread(self._open).result()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` gives, as one transaction. Raises its LmserveError, and 503 or 507 where the disk fails."""
        return await asyncio.wrap_future(self._on_thread(partial(self._transact, work)))

    async def close(self) -> None:
        """Nothing is read or written any more."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.wrap_future(thread.submit(self._close))
            thread.shutdown()

    def _on_thread(self, work: Callable[[], T]) -> Future[T]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "lmserve-state")
        return self._thread.submit(work)

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        try:
            if self._path is not None:
                # SQLite gives its further files the mode of this one.
                os.close(os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK, 0o600))
            connection = sqlite3.connect(self._path or ":memory:", isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS[self._fsync]}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                connection.close()
                message = f"{self._path} has version {version}, but this server reads version {VERSION}; move it away"
                raise LmserveError.new(400, "session_dir_unusable", message)
            connection.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise LmserveError.new(400, "session_dir_unusable", f"{self._path} cannot be used: {reason}") from error
        self._connection = connection
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._open()
        before = connection.total_changes
        try:
            connection.execute("BEGIN")
            try:
                found = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise self._failed(error) from error
        if self.fault is not None and connection.total_changes != before:
            # Reading works on a full disk as well.
            self.fault = None
            logger.warning("the database can be written again")
        return found

    def _failed(self, error: sqlite3.Error) -> LmserveError:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        code = "storage_full" if full else "storage_failed"
        fault = StorageFault(code, f"the database cannot be used: {error}")
        if self.fault is None or self.fault.code != code:
            logger.error(fault.message)
        self.fault = fault
        return LmserveError.new(507 if full else 503, code, fault.message)


def number_of(db: sqlite3.Connection, kind: Literal["file", "batch"], owner: str, after: str | None) -> int | None:
    """The number of what a page comes behind; None: it is the first page. Raises LmserveError (400)."""
    if after is None:
        return None
    table = {"file": "files", "batch": "batches"}[kind]
    words = f"SELECT number FROM {table} WHERE tenant = ? AND id = ?"  # noqa: S608 - of this module
    found = db.execute(words, (owner, after)).fetchone()
    if found is None:
        raise LmserveError.invalid("after", f"after must be a {kind}, but {after[:MAX_QUOTE]!r} was given")
    number: int = found[0]
    return number
