"""Batches: the lines of their input files, and the answer to each line, which is written once."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final, Literal, NamedTuple

import msgspec

from lmserve.api.state import files
from lmserve.api.state.database import MAX_QUOTE, Database, number_of
from lmserve.errors import LmserveError
from lmserve.schemas.batches import (
    MAX_LINES,
    BatchErrors,
    BatchLine,
    BatchReply,
    CreateBatch,
    Endpoint,
    LineError,
    RequestCounts,
    Status,
)

WINDOW: Final = 86_400  # seconds
MAX_RUNNING: Final = 20  # batches of a tenant
MAX_BATCHES: Final = 1000  # of a tenant; those that ended first are deleted to make room
MAX_ERRORS: Final = 100  # that are reported for an input file

End = Literal["completed", "expired", "cancelled"]
# Of lines that are not answered when a batch ends.
UNANSWERED: Final = {
    "completed": ("batch_failed", "the line was not answered"),
    "expired": ("batch_expired", "the batch expired before this line was answered"),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this line was answered"),
}
COLUMNS: Final = (
    "id, endpoint, input_file, metadata, errors, status, output_file, error_file, created, expires, cancelling, ended"
)

_line = msgspec.json.Decoder(BatchLine)
_encode = msgspec.json.encode


class Running(NamedTuple):
    """A batch that is to be run on."""

    owner: str  # the tenant's name for good
    id: str
    endpoint: str
    expires: int
    cancelling: bool


class Line(NamedTuple):
    """A line without an answer."""

    number: int
    custom_id: str
    body: bytes
    kept: bytes | None  # the body of the reply that a conversation has already


class RunningLine(NamedTuple):
    """A line while it runs."""

    owner: str
    batch: str
    number: int

    @property
    def turn_key(self) -> str:
        """What names its turn in a session."""
        return hashlib.sha256("/".join(map(str, self)).encode()).hexdigest()[:32]

    def keep(self, db: sqlite3.Connection, body: bytes) -> None:
        """Keep the body of its reply, in the transaction that makes it a part of something else."""
        db.execute(
            "UPDATE lines SET reply = ? WHERE tenant = ? AND batch = ? AND number = ? AND failed IS NULL",
            (body, *self),
        )


# The line that the requests of this context are for; None: they are for none.
running_line: ContextVar[RunningLine | None] = ContextVar("running_line", default=None)


def read_lines(content: bytes, endpoint: Endpoint) -> tuple[list[tuple[str, bytes]], list[LineError]]:
    """The custom id and the body of each line, and what is wrong with them."""
    lines: list[tuple[str, bytes]] = []
    errors: list[LineError] = []
    seen: set[str] = set()

    def wrong(code: str, message: str, at: int | None, param: str | None = None) -> None:
        errors.append(LineError(code=code, line=at, message=message, param=param))

    for at, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        if len(lines) >= MAX_LINES:
            wrong("too_many_lines", f"a batch may have at most {MAX_LINES} lines, but the file has more", None)
            break
        if len(errors) >= MAX_ERRORS:
            break
        try:
            line = _line.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            wrong("invalid_json_line", f"the line is not a valid request: {error}", at)
            continue
        if line.url != endpoint:
            message = f"every url must be the batch's endpoint, {endpoint}, but {line.url} was given"
            wrong("mismatched_url", message, at, "url")
        elif line.custom_id in seen:
            message = f"every custom_id must be unique, but {line.custom_id[:MAX_QUOTE]!r} was given twice"
            wrong("duplicate_custom_id", message, at, "custom_id")
        elif mode := next((name for name in ("stream", "background") if line.body.get(name)), None):
            wrong("invalid_request", f"{mode} is not supported in a line of a batch", at, f"body.{mode}")
        seen.add(line.custom_id)
        lines.append((line.custom_id, _encode(line.body)))
    if not lines and not errors:
        wrong("empty_file", "the file has no lines", None)
    return lines, errors


class Batches:
    """The batches of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, tenant: int, asked: CreateBatch) -> BatchReply:
        """Begin a batch; one whose input is wrong has failed. Raises LmserveError (400, 404)."""
        owner, batch_id = self._database.name_of(tenant), f"batch_{secrets.token_hex(16)}"

        def work(db: sqlite3.Connection) -> BatchReply:
            row = db.execute(
                "SELECT content FROM files WHERE tenant = ? AND id = ?", (owner, asked.input_file_id)
            ).fetchone()
            if row is None:
                raise files.no_file(asked.input_file_id, "input_file_id")
            if row[0] is None:
                message = f"input_file_id must name an uploaded file, but {asked.input_file_id!r} is a batch's"
                raise LmserveError.invalid("input_file_id", message)
            (running,) = db.execute(
                "SELECT count(*) FROM batches WHERE tenant = ? AND ended IS NULL", (owner,)
            ).fetchone()
            if running >= MAX_RUNNING:
                message = (
                    f"a key may have at most {MAX_RUNNING} running batches, and it has {running}; wait, or cancel one"
                )
                raise LmserveError.invalid(None, message, "too_many_batches")
            _make_room(db, owner)
            lines, errors = read_lines(row[0], asked.endpoint)
            now = int(time.time())
            db.execute(
                "INSERT INTO batches "
                "(tenant, id, endpoint, input_file, metadata, errors, status, created, expires, ended) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    owner,
                    batch_id,
                    asked.endpoint,
                    asked.input_file_id,
                    _encode(asked.metadata or {}).decode(),
                    _encode(errors) if errors else None,
                    "failed" if errors else "in_progress",
                    now,
                    now + WINDOW,
                    now if errors else None,
                ),
            )
            if not errors:
                db.executemany(
                    "INSERT INTO lines (tenant, batch, number, custom_id, body) VALUES (?, ?, ?, ?, ?)",
                    [(owner, batch_id, number, *line) for number, line in enumerate(lines, 1)],
                )
            return _get(db, owner, batch_id)

        return await self._database.run(work)

    async def get(self, tenant: int, batch_id: str) -> BatchReply:
        """Raises LmserveError (404)."""
        owner = self._database.name_of(tenant)
        return await self._database.run(lambda db: _get(db, owner, batch_id))

    async def page(self, tenant: int, *, after: str | None, limit: int) -> tuple[list[BatchReply], bool]:
        """Batches older than `after`, the newest first, and whether there are more. Raises LmserveError (400)."""
        owner = self._database.name_of(tenant)

        def work(db: sqlite3.Connection) -> tuple[list[BatchReply], bool]:
            begin = number_of(db, "batch", owner, after)
            rows = db.execute(
                "SELECT id FROM batches WHERE tenant = ? AND (? IS NULL OR number < ?) ORDER BY number DESC LIMIT ?",
                (owner, begin, begin, limit + 1),
            ).fetchall()
            return [_get(db, owner, batch_id) for (batch_id,) in rows[:limit]], len(rows) > limit

        return await self._database.run(work)

    async def cancel(self, tenant: int, batch_id: str) -> BatchReply:
        """Let no further line begin. Raises LmserveError (400, 404)."""
        owner = self._database.name_of(tenant)

        def work(db: sqlite3.Connection) -> BatchReply:
            batch = _get(db, owner, batch_id)
            if batch.status not in ("in_progress", "cancelling", "cancelled"):
                message = f"only a running batch can be cancelled, but {batch_id!r} is {batch.status}"
                raise LmserveError.invalid("batch_id", message, "batch_ended")
            db.execute(
                "UPDATE batches SET status = 'cancelling', cancelling = ? "
                "WHERE tenant = ? AND id = ? AND status = 'in_progress'",
                (int(time.time()), owner, batch_id),
            )
            return _get(db, owner, batch_id)

        return await self._database.run(work)

    async def running(self) -> list[Running]:
        """All that have not ended."""

        def work(db: sqlite3.Connection) -> list[Running]:
            rows = db.execute(
                "SELECT tenant, id, endpoint, expires, status = 'cancelling' FROM batches WHERE ended IS NULL "
                "ORDER BY number"
            ).fetchall()
            return [
                Running(owner, batch_id, endpoint, expires, bool(c)) for owner, batch_id, endpoint, expires, c in rows
            ]

        return await self._database.run(work)

    async def unanswered(self, batch: Running, limit: int) -> list[Line]:
        """The next lines without an answer."""

        def work(db: sqlite3.Connection) -> list[Line]:
            rows = db.execute(
                "SELECT number, custom_id, body, reply FROM lines "
                "WHERE tenant = ? AND batch = ? AND failed IS NULL ORDER BY number LIMIT ?",
                (batch.owner, batch.id, limit),
            ).fetchall()
            return [Line(*row) for row in rows]

        return await self._database.run(work)

    async def answer(self, batch: Running, line: Line, reply: bytes, *, failed: bool) -> None:
        """Write the line's answer down, unless it has one."""

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE lines SET failed = ?, reply = ?, body = x'' "
                "WHERE tenant = ? AND batch = ? AND number = ? AND failed IS NULL",
                (failed, reply, batch.owner, batch.id, line.number),
            )

        await self._database.run(work)

    async def end(self, batch: Running, end: End) -> None:
        """End a batch, with its files: what is not answered by now is an error. One that has ended stays as it is."""
        code, message = UNANSWERED[end]

        def work(db: sqlite3.Connection) -> None:
            (ended,) = db.execute(
                "SELECT ended FROM batches WHERE tenant = ? AND id = ?", (batch.owner, batch.id)
            ).fetchone()
            if ended is not None:
                return
            rows = db.execute(
                "SELECT number, custom_id FROM lines WHERE tenant = ? AND batch = ? AND failed IS NULL",
                (batch.owner, batch.id),
            ).fetchall()
            db.executemany(
                "UPDATE lines SET failed = 1, reply = ?, body = x'' WHERE tenant = ? AND batch = ? AND number = ?",
                [
                    (told(custom_id, None, {"code": code, "message": message}), batch.owner, batch.id, number)
                    for number, custom_id in rows
                ],
            )
            made = [_output(db, batch, failed=failed) for failed in (False, True)]
            db.execute(
                "UPDATE batches SET status = ?, ended = ?, output_file = ?, error_file = ? WHERE tenant = ? AND id = ?",
                (end, int(time.time()), *made, batch.owner, batch.id),
            )

        await self._database.run(work)


def told(custom_id: str, response: object, error: object) -> bytes:
    """A line of a batch's output."""
    reply = {"id": f"batch_req_{secrets.token_hex(16)}", "custom_id": custom_id, "response": response, "error": error}
    return _encode(reply)


def _output(db: sqlite3.Connection, batch: Running, *, failed: bool) -> str | None:
    count, size = db.execute(
        "SELECT count(*), coalesce(sum(length(reply)), 0) FROM lines WHERE tenant = ? AND batch = ? AND failed = ?",
        (batch.owner, batch.id, failed),
    ).fetchone()
    if count == 0:
        return None
    name = f"{batch.id}_{'error' if failed else 'output'}.jsonl"
    # Each line has its end.
    return files.insert(db, batch.owner, name, "batch_output", size + count, None, batch=batch.id, failed=failed).id


def _make_room(db: sqlite3.Connection, owner: str) -> None:
    (count,) = db.execute("SELECT count(*) FROM batches WHERE tenant = ?", (owner,)).fetchone()
    if count < MAX_BATCHES:
        return
    oldest: Sequence[tuple[str]] = db.execute(
        "SELECT id FROM batches WHERE tenant = ? AND ended IS NOT NULL ORDER BY number LIMIT ?",
        (owner, count - MAX_BATCHES + 1),
    ).fetchall()
    for (batch_id,) in oldest:
        db.execute("DELETE FROM files WHERE tenant = ? AND batch = ?", (owner, batch_id))
        db.execute("DELETE FROM batches WHERE tenant = ? AND id = ?", (owner, batch_id))


def _get(db: sqlite3.Connection, owner: str, batch_id: str) -> BatchReply:
    row = db.execute(
        f"SELECT {COLUMNS} FROM batches WHERE tenant = ? AND id = ?",  # noqa: S608 - words of this module
        (owner, batch_id),
    ).fetchone()
    if row is None:
        message = f"there is no batch {batch_id[:MAX_QUOTE]!r}; it was never created, or was deleted to make room"
        raise LmserveError.new(404, "batch_not_found", message, param="batch_id")
    _, endpoint, input_file, metadata, errors, status, output, error, created, expires, cancelling, ended = row
    total, completed, failed = db.execute(
        "SELECT count(*), coalesce(sum(failed = 0), 0), coalesce(sum(failed = 1), 0) FROM lines "
        "WHERE tenant = ? AND batch = ?",
        (owner, batch_id),
    ).fetchone()

    def when(*statuses: Status) -> int | None:
        return ended if status in statuses else None

    return BatchReply(
        id=batch_id,
        endpoint=endpoint,
        errors=None if errors is None else BatchErrors(data=msgspec.json.decode(errors, type=list[LineError])),
        input_file_id=input_file,
        status=status,
        output_file_id=output,
        error_file_id=error,
        created_at=created,
        in_progress_at=None if status == "failed" else created,
        expires_at=expires,
        finalizing_at=when("completed"),
        completed_at=when("completed"),
        failed_at=when("failed"),
        expired_at=when("expired"),
        cancelling_at=cancelling,
        cancelled_at=when("cancelled"),
        request_counts=RequestCounts(completed=completed, failed=failed, total=total),
        metadata=msgspec.json.decode(metadata),
    )
