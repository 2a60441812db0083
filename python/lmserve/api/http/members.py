"""Several models in one server. A model is loaded when a request asks for it, and unloaded after some idle time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qs

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Receive, ReceiveMessage, Scope, Send, WebSocketScope

from lmserve.api.http.exposition import merged, page
from lmserve.api.http.middleware import BODILESS, PUBLIC
from lmserve.api.http.serving import ModelFacts, Serving
from lmserve.api.http.websocket import deny
from lmserve.api.responses.store import ResponseStore
from lmserve.api.state.batches import Batches
from lmserve.api.state.database import Database
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.memory import give_back_memory
from lmserve.engine.sessions import StorageFault
from lmserve.errors import LmserveError
from lmserve.keys import Keyring

logger = logging.getLogger("lmserve.http")

CHOOSES: Final = "x-lmserve-model"  # of requests whose body names no model
# These take any name of a model, or none, and mean the first one: LMDeploy's clients send one that is not served.
LENIENT: Final = ("/generate", "/v1/chat/interactive", "/v1/sessions")
LISTS: Final = "/v1/models"
METRICS: Final = "/metrics"
LOOK_SECONDS: Final = 1.0  # between two searches for idle models


@dataclass(slots=True)
class Member:
    """A model of the server. `memory`: bytes that must be free to load it.

    `mapped`: of these, while it is loaded, those in pages of a file, which the system counts as free.
    """

    names: tuple[str, ...]
    load: Callable[[], AsyncEngine]  # may block
    memory: int
    max_model_len: int
    sampling: Mapping[str, float | int]
    responses: Callable[[], ResponseStore] = ResponseStore
    database: Callable[[], Database | None] = lambda: None
    serving: Serving | None = None  # while it is loaded
    requests: int = 0  # that use it now, or wait for it
    used: float = field(default_factory=time.monotonic)  # when the last one ended
    opening: asyncio.Task[None] | None = None
    mapped: int = 0

    @property
    def idle(self) -> bool:
        """Loaded, and not in use."""
        serving = self.serving
        if serving is None or self.requests or serving.background or serving.batch_runner.runs:
            return False
        return not serving.engine.open_streams


class Members(Serving):
    """What the handlers share where a request chooses its model; each loaded one has a `Serving` of its own."""

    def __init__(
        self,
        members: Sequence[Member],
        keys: Keyring | None = None,
        *,
        free_memory: Callable[[], int],
        idle_unload: float = 0.0,
        agent_sessions: bool = True,
    ) -> None:
        """The first of `members` serves requests that name no model.

        `free_memory`: bytes that this process may still take. `idle_unload`: seconds without a request after which a
        model is unloaded; 0: only to make room for another. Raises ValueError if two have the same name.
        """
        names = [name for member in members for name in member.names]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two models have the name {twice!r}")
        super().__init__(names, _none, keys, agent_sessions=agent_sessions)
        self._members = tuple(members)
        self._free_memory = free_memory
        self._idle_unload = idle_unload
        # One at a time: the memory of the next is reckoned once the last one has its own.
        self._one = asyncio.Lock()

    def find(self, name: str | None) -> Member:
        """The model of this name; None: the first. Raises LmserveError (404)."""
        if name is None:
            return self._members[0]
        self.check_model(name)
        return next(member for member in self._members if name in member.names)

    def facts_of(self, name: str) -> ModelFacts:
        """What `/v1/models` tells, loaded or not."""
        member = self.find(name)
        return ModelFacts(member.names[0], member.max_model_len, member.sampling)

    @contextmanager
    def use(self, member: Member) -> Iterator[None]:
        """While this lasts, the model is not unloaded."""
        member.requests += 1
        try:
            yield
        finally:
            member.requests -= 1
            member.used = time.monotonic()

    async def open(self, member: Member) -> Serving:
        """The loaded model, which the caller uses. Raises LmserveError (503) if it cannot be loaded."""
        while member.serving is None:
            if self.draining:
                raise LmserveError.new(503, "draining", "the server is stopping and takes no new request")
            if member.opening is None:
                member.opening = asyncio.create_task(self._load_member(member))
                # If all waiting requests have gone, nothing else reads the exception.
                member.opening.add_done_callback(lambda task: task.cancelled() or task.exception())
            # A client that leaves does not end the loading that others wait for.
            await asyncio.shield(member.opening)
        return member.serving

    async def load(self) -> None:
        """Continue unfinished batches, then unload models that have been idle for too long, until this is cancelled."""
        for member in self._members:
            if await self._has_batches(member):
                logger.info("the model %s has a batch to go on with", member.names[0])
                with self.use(member):
                    try:
                        await self.open(member)
                    except LmserveError as error:
                        logger.error("the batches of the model %s have to wait: %s", member.names[0], error)  # noqa: TRY400
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            before = time.monotonic() - self._idle_unload
            for member in self._members:
                if self._idle_unload and member.idle and member.used <= before:
                    async with self._one:
                        await self._unload(member)

    async def drain(self, grace: float) -> None:
        """Refuse new requests and stop every engine."""
        self.draining = True
        loaded = [member.serving for member in self._members if member.serving is not None]
        await asyncio.gather(*(serving.drain(grace) for serving in loaded))

    async def close(self) -> None:
        """Stop every engine, and whatever is being loaded."""
        await self.drain(0)
        for member in self._members:
            if member.opening is not None:
                member.opening.cancel()
            if member.serving is not None:
                await member.serving.close()

    def check_ready(self) -> None:
        """Raises LmserveError (503) while the server stops: a model that is not loaded is no fault."""
        if self.draining:
            raise LmserveError.new(503, "draining", "the server is stopping and takes no new request")

    def check_alive(self) -> None:
        """Raises LmserveError (503) where an engine stands still for long."""
        for serving in self._loaded():
            serving.check_alive()

    def has_failed(self) -> bool:
        """Never: a model whose engine is dead is dropped, and loaded anew by the next request for it."""
        for member in self._members:
            if member.serving is not None and member.serving.has_failed():
                logger.error("the model %s is dropped; the next request loads it again", member.names[0])
                dead, member.serving = member.serving, None
                task = asyncio.get_running_loop().create_task(dead.close())
                self.background.add(task)
                task.add_done_callback(self.background.discard)
        return False

    def storage_faults(self) -> list[StorageFault]:
        """Those of every loaded model."""
        return [fault for serving in self._loaded() for fault in serving.storage_faults()]

    def tell_of_storage(self) -> None:
        """Log what is news about the logs of the loaded models."""
        for serving in self._loaded():
            serving.tell_of_storage()

    def metrics(self, tenant: int) -> str:
        """The pages of the loaded models as one: who watches a server loads no model."""
        first = page("", None, self.http, {})
        return merged([first, *(serving.metrics(tenant) for serving in self._loaded())])

    def _loaded(self) -> list[Serving]:
        return [member.serving for member in self._members if member.serving is not None]

    async def _has_batches(self, member: Member) -> bool:
        """Whether a batch of a model that is not loaded has lines to run."""
        async with self._one:
            database = None if member.serving is not None else member.database()
            if database is None:
                return False
            try:
                batches = await Batches(database).running()
            except LmserveError:
                # Loading the model says why, to whoever asks for it.
                return False
            finally:
                await database.close()
        return any(database.tenant_of(batch.owner) is not None for batch in batches)

    async def _load_member(self, member: Member) -> None:
        try:
            async with self._one:
                await self._make_room(member)
                logger.info("the model %s is being loaded", member.names[0])
                began = time.monotonic()
                responses = member.responses()
                serving = Serving(
                    member.names,
                    member.load,
                    self.keys,
                    responses,
                    member.database(),
                    agent_sessions=self.agent_sessions,
                )
                serving.batch_runner.app = self.batch_runner.app
                await serving.load()
                if serving.failure is not None:
                    await responses.close()
                    await serving.database.close()
                    message = f"the model {member.names[0]} could not be loaded: {serving.failure}"
                    raise LmserveError.new(503, "engine_failed", message)
                logger.info("the model %s was loaded in %.1f s", member.names[0], time.monotonic() - began)
                member.serving = serving
        finally:
            member.opening = None

    async def _make_room(self, member: Member) -> None:
        """Unload idle models, the least recently used first, until there is memory for `member`."""
        while self._free_memory() - self._mapped() < member.memory:
            idle = sorted((other for other in self._members if other.idle), key=lambda other: other.used)
            if not idle:
                return
            await self._unload(idle[0])

    def _mapped(self) -> int:
        return sum(member.mapped for member in self._members if member.serving is not None)

    async def _unload(self, member: Member) -> None:
        serving = member.serving
        if serving is None or not member.idle:
            return
        member.serving = None
        await serving.close()
        del serving
        # Its weights are freed with the last object that knows them.
        give_back_memory()
        logger.info("the model %s was unloaded", member.names[0])


def _none() -> AsyncEngine:
    raise RuntimeError("a server of several models has no engine of its own")


class _Named(msgspec.Struct):
    model: str | None = None


class ChooseModel:
    """Finds the model of a request: `?model=`, the header x-lmserve-model, or the body's `model`; else the first."""

    def __init__(self, app: ASGIApp, members: Members) -> None:
        """Runs after the checks of the key and the body: a refused request loads no model."""
        self._app = app
        self._members = members

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.WEBSOCKET:
            await self._open_socket(scope, receive, send)
            return
        if (
            scope["type"] != ScopeType.HTTP
            or scope["method"] == "OPTIONS"
            or scope["route_handler"].opt.get(PUBLIC)
            or scope["path"] in (LISTS, METRICS)
            or scope["path"].startswith(f"{LISTS}/")
        ):
            await self._app(scope, receive, send)
            return
        first: ReceiveMessage | None = None if scope["method"] in BODILESS else await receive()

        async def receive_again() -> ReceiveMessage:
            nonlocal first
            if first is None:
                return await receive()
            read, first = first, None
            return read

        body = first["body"] if first is not None and first["type"] == "http.request" else b""
        member = self._members.find(self._name(scope, body))
        with self._members.use(member):
            scope["state"]["serving"] = await self._members.open(member)
            await self._app(scope, receive_again, send)

    async def _open_socket(self, scope: WebSocketScope, receive: Receive, send: Send) -> None:
        """The handshake chooses, as its messages come later: `?model=`, the header, or else the first."""
        try:
            member = self._members.find(self._name(scope, b""))
            with self._members.use(member):
                scope["state"]["serving"] = await self._members.open(member)
                await self._app(scope, receive, send)
        except LmserveError as error:
            # The handler sends its own errors.
            await deny(error, scope, send)

    def _name(self, scope: HTTPScope | WebSocketScope, body: bytes) -> str | None:
        query = parse_qs(scope["query_string"].decode("latin-1")).get("model")
        header = next((value for name, value in scope["headers"] if name == CHOOSES.encode()), None)
        if query or header:
            return query[0] if query else (header or b"").decode("latin-1")
        try:
            name = msgspec.json.decode(body, type=_Named).model if body else None
        except (msgspec.DecodeError, UnicodeDecodeError):
            # What is wrong with it, its route says.
            return None
        if not name or (scope["path"].startswith(LENIENT) and name not in self._members.names):
            return None
        return name
