"""Conversations: their items, and the tip, the response whose session in the core has the tokens of all items.

The next response continues from the tip, token for token. If there is no tip, because items were deleted or the session
was dropped to make room, the next response begins anew with all items.
"""

from __future__ import annotations

import re
import secrets
import sqlite3
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from lmserve.api.state.batches import running_line
from lmserve.api.state.database import MAX_QUOTE, Database
from lmserve.errors import LmserveError
from lmserve.schemas.conversations import ConversationReply
from lmserve.schemas.response_reply import StoredItem

CONVERSATION_ID: Final = re.compile("conv_[0-9a-f]{32}")
MAX_CONVERSATIONS: Final = 10_000  # of a tenant
MAX_ITEMS: Final = 8192  # of a conversation
MAX_BYTES: Final = 16_777_216  # of a conversation's items

_encode = msgspec.json.encode


class Tip(NamedTuple):
    """The response whose session has a conversation's tokens."""

    response_id: str
    stored: bool  # as a response of its own, which outlives the conversation


class Standing(NamedTuple):
    """Where a conversation stands."""

    id: str
    instructions: str | None  # those in force
    tip: Tip | None
    pending: list[bytes]  # items that the tip's session does not have, or all


class Turn(NamedTuple):
    """What a response adds to a conversation."""

    instructions: str | None
    tip: Tip
    items: Sequence[StoredItem]


def new_items(items: Sequence[StoredItem]) -> list[tuple[str, bytes]]:
    return [(item.id, _encode(item)) for item in items]


class Conversations:
    """The conversations of all tenants. One response at a time runs in each; meanwhile its items stay as they are."""

    def __init__(self, database: Database, *, max_conversations: int = MAX_CONVERSATIONS) -> None:
        self._database = database
        self._max_conversations = max_conversations
        self._busy: set[tuple[int, str]] = set()

    async def create(self, tenant: int, metadata: dict[str, str], items: Sequence[StoredItem]) -> ConversationReply:
        """A new one. Raises LmserveError (400) where the tenant has too many, or the items are too large."""
        owner, made = self._database.name_of(tenant), new_items(items)
        reply = ConversationReply(id=f"conv_{secrets.token_hex(16)}", created_at=int(time.time()), metadata=metadata)

        def work(db: sqlite3.Connection) -> ConversationReply:
            (count,) = db.execute("SELECT count(*) FROM conversations WHERE tenant = ?", (owner,)).fetchone()
            if count >= self._max_conversations:
                message = f"a key may have at most {self._max_conversations} conversations, and this key has {count}"
                raise LmserveError.invalid(None, f"{message}; delete one", "too_many_conversations")
            db.execute(
                "INSERT INTO conversations (tenant, id, created, metadata) VALUES (?, ?, ?, ?)",
                (owner, reply.id, reply.created_at, _encode(metadata).decode()),
            )
            _add(db, owner, reply.id, made)
            return reply

        return await self._database.run(work)

    async def get(self, tenant: int, conversation_id: str) -> ConversationReply:
        """Raises LmserveError (404)."""
        owner = self._database.name_of(tenant)
        return await self._database.run(lambda db: _reply(db, owner, conversation_id))

    async def update(self, tenant: int, conversation_id: str, metadata: dict[str, str]) -> ConversationReply:
        """Give it other metadata. Raises LmserveError (404)."""
        owner = self._database.name_of(tenant)

        def work(db: sqlite3.Connection) -> ConversationReply:
            db.execute(
                "UPDATE conversations SET metadata = ? WHERE tenant = ? AND id = ?",
                (_encode(metadata).decode(), owner, conversation_id),
            )
            return _reply(db, owner, conversation_id)

        return await self._database.run(work)

    async def delete(self, tenant: int, conversation_id: str) -> Tip | None:
        """Forget it; its tip. Raises LmserveError (404, 409)."""
        owner = self._database.name_of(tenant)
        self._check_idle(tenant, conversation_id)

        def work(db: sqlite3.Connection) -> Tip | None:
            tip = _standing(db, owner, conversation_id).tip
            db.execute("DELETE FROM conversations WHERE tenant = ? AND id = ?", (owner, conversation_id))
            return tip

        return await self._database.run(work)

    async def add(self, tenant: int, conversation_id: str, items: Sequence[StoredItem]) -> None:
        """Add items at the end. Raises LmserveError (400, 404, 409)."""
        owner, made = self._database.name_of(tenant), new_items(items)
        self._check_idle(tenant, conversation_id)

        def work(db: sqlite3.Connection) -> None:
            _reply(db, owner, conversation_id)
            _add(db, owner, conversation_id, made)

        await self._database.run(work)

    async def page(
        self, tenant: int, conversation_id: str, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[bytes], bool]:
        """Items after `after`, and whether there are more. Raises LmserveError (400, 404)."""
        owner = self._database.name_of(tenant)

        def work(db: sqlite3.Connection) -> tuple[list[bytes], bool]:
            _reply(db, owner, conversation_id)
            begin = None if after is None else _number(db, owner, conversation_id, after)
            if after is not None and begin is None:
                message = f"after must be an item of the conversation, but {after[:MAX_QUOTE]!r} was given"
                raise LmserveError.invalid("after", message)
            order, behind = ("DESC", "<") if newest_first else ("ASC", ">")
            rows = db.execute(
                f"SELECT body FROM items WHERE tenant = ? AND conversation = ? AND (? IS NULL OR number {behind} ?) "  # noqa: S608 - words of this module
                f"ORDER BY number {order} LIMIT ?",
                (owner, conversation_id, begin, begin, limit + 1),
            ).fetchall()
            return [body for (body,) in rows[:limit]], len(rows) > limit

        return await self._database.run(work)

    async def item(self, tenant: int, conversation_id: str, item_id: str) -> bytes:
        """Raises LmserveError (404)."""
        owner = self._database.name_of(tenant)

        def work(db: sqlite3.Connection) -> bytes:
            _reply(db, owner, conversation_id)
            row = db.execute(
                "SELECT body FROM items WHERE tenant = ? AND conversation = ? AND id = ?",
                (owner, conversation_id, item_id),
            ).fetchone()
            if row is None:
                raise no_item(item_id)
            return bytes(row[0])

        return await self._database.run(work)

    async def delete_item(self, tenant: int, conversation_id: str, item_id: str) -> Tip | None:
        """Take an item out; the tip, where its session had the item. Raises LmserveError (404, 409)."""
        owner = self._database.name_of(tenant)
        self._check_idle(tenant, conversation_id)

        def work(db: sqlite3.Connection) -> Tip | None:
            standing = _standing(db, owner, conversation_id)
            number = _number(db, owner, conversation_id, item_id)
            if number is None:
                raise no_item(item_id)
            db.execute("DELETE FROM items WHERE number = ?", (number,))
            forgot = db.execute(
                "UPDATE conversations SET tip = NULL, tip_item = 0 WHERE tenant = ? AND id = ? AND tip_item >= ?",
                (owner, conversation_id, number),
            )
            return standing.tip if forgot.rowcount else None

        return await self._database.run(work)

    async def begin(self, tenant: int, conversation_id: str) -> OpenTurn:
        """Begin a response's turn, which its owner must end. Raises LmserveError (400, 404, 409)."""
        self._check_idle(tenant, conversation_id)
        key = (tenant, conversation_id)
        self._busy.add(key)
        owner = self._database.name_of(tenant)
        try:
            standing = await self._database.run(lambda db: _standing(db, owner, conversation_id, room=True))
        except BaseException:
            self._busy.discard(key)
            raise
        return OpenTurn(self._database, self._busy, key, standing)

    async def standing(self, tenant: int, conversation_id: str, *, anew: bool = False) -> Standing:
        """Where it stands; `anew`: as if it had no tip. Raises LmserveError (404)."""
        owner = self._database.name_of(tenant)
        return await self._database.run(lambda db: _standing(db, owner, conversation_id, anew=anew))

    def _check_idle(self, tenant: int, conversation_id: str) -> None:
        if (tenant, conversation_id) in self._busy:
            message = f"a response is running in conversation {conversation_id!r}; wait for its end, or cancel it"
            raise LmserveError.new(409, "conversation_busy", message, param="conversation", retry_after=1)


class OpenTurn:
    """The turn of a response that runs in a conversation."""

    def __init__(
        self, database: Database, busy: set[tuple[int, str]], key: tuple[int, str], standing: Standing
    ) -> None:
        self.standing = standing
        self._database = database
        self._busy = busy
        self._key = key

    async def begin_anew(self) -> None:
        """Leave out the tip, whose session is gone: all items are pending."""
        owner, conversation_id = self._owner
        self.standing = await self._database.run(lambda db: _standing(db, owner, conversation_id, anew=True))

    async def commit(self, turn: Turn, body: bytes) -> Tip | None:
        """Add what was asked and answered; the tip that is out of date with it. Raises LmserveError (503, 507).

        `body`: the response's. A line of a batch is answered by it if the server dies now.
        """
        owner, conversation_id = self._owner
        made, line = new_items(turn.items), running_line.get()

        def work(db: sqlite3.Connection) -> None:
            # It may have been deleted by a server before this one; a conversation that is busy is not.
            last = _append(db, owner, conversation_id, made)
            db.execute(
                "UPDATE conversations SET instructions = ?, tip = ?, tip_stored = ?, tip_item = ? "
                "WHERE tenant = ? AND id = ?",
                (turn.instructions, turn.tip.response_id, turn.tip.stored, last, owner, conversation_id),
            )
            if line is not None:
                line.keep(db, body)

        try:
            await self._database.run(work)
        finally:
            self.release()
        return self.standing.tip

    def release(self) -> None:
        """End the turn, without anything to keep if it was not committed. Idempotent."""
        self._busy.discard(self._key)

    @property
    def _owner(self) -> tuple[str, str]:
        tenant, conversation_id = self._key
        return self._database.name_of(tenant), conversation_id


def no_conversation(conversation_id: str) -> LmserveError:
    message = f"there is no conversation {conversation_id[:MAX_QUOTE]!r}; it was never created, or was deleted"
    return LmserveError.new(404, "conversation_not_found", message, param="conversation")


def no_item(item_id: str) -> LmserveError:
    message = f"the conversation has no item {item_id[:MAX_QUOTE]!r}"
    return LmserveError.new(404, "item_not_found", message, param="item_id")


def _reply(db: sqlite3.Connection, owner: str, conversation_id: str) -> ConversationReply:
    row = db.execute(
        "SELECT created, metadata FROM conversations WHERE tenant = ? AND id = ?", (owner, conversation_id)
    ).fetchone()
    if row is None:
        raise no_conversation(conversation_id)
    created, metadata = row
    return ConversationReply(id=conversation_id, created_at=created, metadata=msgspec.json.decode(metadata))


def _number(db: sqlite3.Connection, owner: str, conversation_id: str, item_id: str) -> int | None:
    row = db.execute(
        "SELECT number FROM items WHERE tenant = ? AND conversation = ? AND id = ?", (owner, conversation_id, item_id)
    ).fetchone()
    return None if row is None else row[0]


def _size(db: sqlite3.Connection, owner: str, conversation_id: str) -> tuple[int, int]:
    """How many items a conversation has, and of how many bytes."""
    count, size = db.execute(
        "SELECT count(*), coalesce(sum(length(body)), 0) FROM items WHERE tenant = ? AND conversation = ?",
        (owner, conversation_id),
    ).fetchone()
    return count, size


def _check_room(count: int, size: int) -> None:
    if count > MAX_ITEMS or size > MAX_BYTES:
        limits = f"a conversation may have at most {MAX_ITEMS} items with {MAX_BYTES} bytes together"
        message = (
            f"{limits}, but this one would have {count} items with {size} bytes; create another one, or delete items"
        )
        raise LmserveError.invalid("items", message, "conversation_full")


def _add(db: sqlite3.Connection, owner: str, conversation_id: str, items: Sequence[tuple[str, bytes]]) -> None:
    count, size = _size(db, owner, conversation_id)
    _check_room(count + len(items), size + sum(len(body) for _, body in items))
    _append(db, owner, conversation_id, items)


def _append(db: sqlite3.Connection, owner: str, conversation_id: str, items: Sequence[tuple[str, bytes]]) -> int:
    """Add items; the number of the conversation's last one."""
    db.executemany(
        "INSERT INTO items (tenant, conversation, id, body) VALUES (?, ?, ?, ?)",
        [(owner, conversation_id, item_id, body) for item_id, body in items],
    )
    (last,) = db.execute(
        "SELECT coalesce(max(number), 0) FROM items WHERE tenant = ? AND conversation = ?", (owner, conversation_id)
    ).fetchone()
    return int(last)


def _standing(
    db: sqlite3.Connection, owner: str, conversation_id: str, *, anew: bool = False, room: bool = False
) -> Standing:
    """`anew`: as if it had no tip. `room`: raise LmserveError (400) where it is full."""
    row = db.execute(
        "SELECT instructions, tip, tip_stored, tip_item FROM conversations WHERE tenant = ? AND id = ?",
        (owner, conversation_id),
    ).fetchone()
    if row is None:
        raise no_conversation(conversation_id)
    instructions, tip, stored, tip_item = row
    if room:
        count, size = _size(db, owner, conversation_id)
        _check_room(count + 1, size + 1)
    if anew:
        tip, tip_item = None, 0
    pending = db.execute(
        "SELECT body FROM items WHERE tenant = ? AND conversation = ? AND number > ? ORDER BY number",
        (owner, conversation_id, tip_item),
    ).fetchall()
    found = None if tip is None else Tip(tip, bool(stored))
    return Standing(conversation_id, instructions, found, [body for (body,) in pending])
