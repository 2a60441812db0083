"""Files: uploaded ones, and the outputs of batches, which are read from the batches' lines."""

from __future__ import annotations

import secrets
import sqlite3
import time
from typing import Final

from lmserve.api.state.database import MAX_QUOTE, Database, number_of
from lmserve.errors import LmserveError
from lmserve.schemas.files import FileReply, Purpose

MAX_FILES: Final = 1000  # of a tenant
MAX_BYTES: Final = 1 << 30  # of a tenant's uploaded files
PAGE_LINES: Final = 500  # of a batch's output that are read at once

COLUMNS: Final = "id, bytes, created, filename, purpose"


class Files:
    """The files of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def upload(self, tenant: int, name: str, content: bytes) -> FileReply:
        """Keep a file. Raises LmserveError (400) where the tenant has too many."""
        owner = self._database.name_of(tenant)

        def work(db: sqlite3.Connection) -> FileReply:
            count, size = db.execute(
                "SELECT count(*), coalesce(sum(length(content)), 0) FROM files WHERE tenant = ?", (owner,)
            ).fetchone()
            if count >= MAX_FILES or size + len(content) > MAX_BYTES:
                limits = f"a key may have at most {MAX_FILES} files, and {MAX_BYTES} bytes of uploaded files"
                message = (
                    f"{limits}, but with this file it would have {count + 1} files and {size + len(content)} bytes; "
                    "delete some"
                )
                raise LmserveError.invalid("file", message, "too_many_files")
            return insert(db, owner, name, "batch", len(content), content)

        return await self._database.run(work)

    async def get(self, tenant: int, file_id: str) -> FileReply:
        """Raises LmserveError (404)."""
        owner = self._database.name_of(tenant)
        return await self._database.run(lambda db: _file(db, owner, file_id))

    async def page(
        self, tenant: int, *, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> tuple[list[FileReply], bool]:
        """Files after `after`, and whether there are more. Raises LmserveError (400)."""
        owner = self._database.name_of(tenant)

        def work(db: sqlite3.Connection) -> tuple[list[FileReply], bool]:
            begin = number_of(db, "file", owner, after)
            order, behind = ("DESC", "<") if newest_first else ("ASC", ">")
            rows = db.execute(
                f"SELECT {COLUMNS} FROM files WHERE tenant = ? AND (? IS NULL OR purpose = ?) "  # noqa: S608 - words of this module
                f"AND (? IS NULL OR number {behind} ?) ORDER BY number {order} LIMIT ?",
                (owner, purpose, purpose, begin, begin, limit + 1),
            ).fetchall()
            return [_reply(row) for row in rows[:limit]], len(rows) > limit

        return await self._database.run(work)

    async def content(self, tenant: int, file_id: str) -> bytes | None:
        """Of an uploaded file; None: it is a batch's, read by `lines`. Raises LmserveError (404)."""
        owner = self._database.name_of(tenant)

        def work(db: sqlite3.Connection) -> bytes | None:
            _file(db, owner, file_id)
            row = db.execute("SELECT content FROM files WHERE tenant = ? AND id = ?", (owner, file_id)).fetchone()
            return None if row[0] is None else bytes(row[0])

        return await self._database.run(work)

    async def lines(self, tenant: int, file_id: str, after: int) -> list[tuple[int, bytes]]:
        """The next lines of a batch's file after the line `after`, each with its number; empty at the end.

        Raises LmserveError (404): it was deleted meanwhile.
        """
        owner = self._database.name_of(tenant)

        def work(db: sqlite3.Connection) -> list[tuple[int, bytes]]:
            _file(db, owner, file_id)
            return db.execute(
                "SELECT lines.number, lines.reply FROM lines "
                "JOIN files ON files.tenant = lines.tenant AND files.batch = lines.batch "
                "WHERE files.tenant = ? AND files.id = ? AND lines.failed = files.failed AND lines.number > ? "
                "ORDER BY lines.number LIMIT ?",
                (owner, file_id, after, PAGE_LINES),
            ).fetchall()

        return await self._database.run(work)

    async def delete(self, tenant: int, file_id: str) -> None:
        """Raises LmserveError (404)."""
        owner = self._database.name_of(tenant)

        def work(db: sqlite3.Connection) -> None:
            _file(db, owner, file_id)
            db.execute(
                "UPDATE lines SET reply = x'' WHERE (tenant, batch, failed) IN "
                "(SELECT tenant, batch, failed FROM files WHERE tenant = ? AND id = ?)",
                (owner, file_id),
            )
            db.execute("DELETE FROM files WHERE tenant = ? AND id = ?", (owner, file_id))

        await self._database.run(work)


def insert(
    db: sqlite3.Connection,
    owner: str,
    name: str,
    purpose: Purpose,
    size: int,
    content: bytes | None,
    *,
    batch: str | None = None,
    failed: bool = False,
) -> FileReply:
    """A new file; without content: the lines of a batch that failed, or that did not."""
    reply = FileReply(
        id=f"file-{secrets.token_hex(16)}", bytes=size, created_at=int(time.time()), filename=name, purpose=purpose
    )
    db.execute(
        "INSERT INTO files (tenant, id, created, filename, purpose, bytes, content, batch, failed) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (owner, reply.id, reply.created_at, name, purpose, size, content, batch, failed),
    )
    return reply


def no_file(file_id: str, param: str = "file_id") -> LmserveError:
    message = f"there is no file {file_id[:MAX_QUOTE]!r}; it was never uploaded, or was deleted"
    return LmserveError.new(404, "file_not_found", message, param=param)


def _file(db: sqlite3.Connection, owner: str, file_id: str) -> FileReply:
    row = db.execute(f"SELECT {COLUMNS} FROM files WHERE tenant = ? AND id = ?", (owner, file_id)).fetchone()  # noqa: S608 - words of this module
    if row is None:
        raise no_file(file_id)
    return _reply(row)


def _reply(row: tuple[str, int, int, str, Purpose]) -> FileReply:
    file_id, size, created, name, purpose = row
    return FileReply(id=file_id, bytes=size, created_at=created, filename=name, purpose=purpose)
