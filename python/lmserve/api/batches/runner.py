"""Runs batches line by line, after all other requests, and continues where it was after a restart."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec
from litestar.types import ASGIApp

from lmserve.api.batches.inner_request import InnerReply, post
from lmserve.api.state.batches import Batches, End, Line, Running, RunningLine, running_line, told
from lmserve.engine.async_engine import in_background, turn_key
from lmserve.errors import LmserveError

logger = logging.getLogger("lmserve.http")

AT_ONCE: Final = 8  # lines of all batches
AHEAD: Final = 32  # lines of a batch that are read at once
FIRST_PAUSE: Final = 0.1  # seconds before a line is tried again that was not taken
LAST_PAUSE: Final = 5.0
OK: Final = 200

T = TypeVar("T")


class BatchRunner:
    """A task for each batch that runs."""

    def __init__(self, batches: Batches, tenant_of: Callable[[str], int | None]) -> None:
        """`tenant_of`: the tenant of a name for good; None: it has no key any more, and its batches wait."""
        self.app: ASGIApp | None = None  # the application, with what stands around its routes
        self._batches = batches
        self._tenant_of = tenant_of
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._stopped = False

    async def wake(self) -> None:
        """Run what has not ended. For the server's start, and after each change."""
        try:
            running = await self._batches.running()
        except LmserveError as error:
            logger.error("the batches cannot be read and have to wait: %s", error)  # noqa: TRY400 - it says all there is to say
            return
        for batch in running:
            key, tenant = (batch.owner, batch.id), self._tenant_of(batch.owner)
            task = self._tasks.get(key)
            if batch.cancelling and task is not None:
                task.cancel()
            if tenant is not None and not self._stopped and (task is None or task.cancelling()):
                self._tasks[key] = asyncio.create_task(self._run(batch, tenant, after=task))

    @property
    def runs(self) -> bool:
        """Whether a batch does."""
        return bool(self._tasks)

    async def stop(self) -> None:
        """Let lines that run go; they are run again after the next start."""
        self._stopped = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, batch: Running, tenant: int, after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await asyncio.wait([after])
        in_background.set(True)
        try:
            if not batch.cancelling:
                await self._answer_all(batch, tenant)
            end: End = "cancelled" if batch.cancelling else "expired" if _is_over(batch) else "completed"
            await _insist(lambda: self._batches.end(batch, end))
        finally:
            if self._tasks.get((batch.owner, batch.id)) is asyncio.current_task():
                del self._tasks[batch.owner, batch.id]

    async def _answer_all(self, batch: Running, tenant: int) -> None:
        """Until all lines are answered, or the batch's time is over."""
        while not _is_over(batch):
            lines = await _insist(lambda: self._batches.unanswered(batch, AHEAD))
            if not lines:
                return
            async with asyncio.TaskGroup() as group:
                for line in lines:
                    group.create_task(self._answer(batch, tenant, line))

    async def _answer(self, batch: Running, tenant: int, line: Line) -> None:
        async with self._slots:
            running = RunningLine(batch.owner, batch.id, line.number)
            running_line.set(running)
            turn_key.set(running.turn_key)
            if line.kept is not None:
                # The server died between this line's turn and its answer.
                reply: InnerReply | None = InnerReply(OK, uuid.uuid4().hex, None, line.kept)
            else:
                reply = await self._ask(batch, tenant, line)
            if reply is None:
                return
            response = {
                "status_code": reply.status,
                "request_id": reply.request_id,
                "body": msgspec.Raw(reply.body or b"null"),
            }
            answer = told(line.custom_id, response, None)
            await _insist(lambda: self._batches.answer(batch, line, answer, failed=reply.status != OK))

    async def _ask(self, batch: Running, tenant: int, line: Line) -> InnerReply | None:
        """The reply, once the server takes the line; None: not before the batch's time was over."""
        if self.app is None:
            raise RuntimeError("the runner has no application")
        pause = FIRST_PAUSE
        while not _is_over(batch):
            reply = await post(self.app, tenant, batch.id, batch.endpoint, line.body)
            if not reply.is_not_now:
                return reply
            await asyncio.sleep(min(max(pause, reply.retry_after or 0.0), LAST_PAUSE))
            pause *= 2
        return None


def _is_over(batch: Running) -> bool:
    return time.time() >= batch.expires


async def _insist(work: Callable[[], Awaitable[T]]) -> T:
    """What `work` gives, once the disk works."""
    while True:
        try:
            return await work()
        except LmserveError:
            # The database tells of it.
            await asyncio.sleep(LAST_PAUSE)
