"""The served model: its names, and its engine once it is loaded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from litestar.connection import ASGIConnection

from lmserve import __version__
from lmserve.api.batches.runner import BatchRunner
from lmserve.api.http.exposition import page
from lmserve.api.responses.store import ResponseStore
from lmserve.api.state.batches import Batches
from lmserve.api.state.conversations import Conversations
from lmserve.api.state.database import Database
from lmserve.api.state.files import Files
from lmserve.engine.adapters import LoadedAdapter
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.sessions import StorageFault
from lmserve.errors import LmserveError
from lmserve.keys import Keyring
from lmserve.loading import Loading, begin
from lmserve.schemas.anthropic import CountTokensRequest, MessagesRequest
from lmserve.schemas.chat import ChatRequest
from lmserve.schemas.cohere import EmbedRequest
from lmserve.schemas.completions import CompletionRequest
from lmserve.schemas.embeddings import EmbeddingsRequest
from lmserve.schemas.responses import ResponsesRequest
from lmserve.schemas.scoring import ClassifyRequest, RerankRequest, ScoreRequest
from lmserve.schemas.tei import AnyRerankRequest, InputsRequest

MOST_KEYS: Final = 1000  # of which /metrics has series
logger = logging.getLogger("lmserve.http")

# Seconds after which a client may ask a server that is still loading again.
RETRY_LOADING = 2
# Seconds without a step, while work waits, after which an orchestrator had better start the server again.
STALLED_FOR_GOOD = 60
# Codes of an engine that may work again by itself.
PASSING: Final = ("engine_stalled", "worker_unavailable")


RequestT = TypeVar(
    "RequestT",
    bound=AnyRerankRequest
    | ChatRequest
    | ClassifyRequest
    | CompletionRequest
    | CountTokensRequest
    | EmbedRequest
    | EmbeddingsRequest
    | InputsRequest
    | MessagesRequest
    | RerankRequest
    | ResponsesRequest
    | ScoreRequest,
)


def model_of(data: RequestT) -> str:
    """The model of a request that `with_model` gave back."""
    return data.model or ""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What `/v1/models` tells of a name: the model's first one, its context in tokens, what it samples with."""

    root: str
    max_model_len: int
    sampling: Mapping[str, float | int]
    parent: str | None = None  # of an adapter: the model that it changes
    created: int | None = None  # of an adapter: when it was loaded, in seconds since 1970


class Serving:
    """What the handlers share. `names`: the first is the model's id, the others are accepted too."""

    def __init__(
        self,
        names: Sequence[str],
        engine: AsyncEngine | Callable[[], AsyncEngine],
        keys: Keyring | None = None,
        responses: ResponseStore | None = None,
        database: Database | None = None,
        *,
        agent_sessions: bool = True,
        adapters: Sequence[str] = (),
        lora_dir: Path | None = None,
    ) -> None:
        """`engine`: a ready one, which stays its owner's, or a function that loads one (it may block).

        `responses`: restored by the time that the engine is there; closed here. None: kept in memory alone.
        `database`: of conversations; closed here. None: in memory alone.
        `agent_sessions`: requests may name the conversation that they go on with.
        `adapters`: names of those that are loaded with the engine. `lora_dir`: whose adapters clients may load; None:
        clients may load and unload none.
        """
        if not names:
            raise ValueError("a served model needs a name")
        self.names = tuple(names)
        self._first_adapters = tuple(adapters)
        self.lora_dir = lora_dir
        self.keys = keys or Keyring()
        self.created = int(time.time())
        self.draining = False
        self.http: Counter[tuple[str, int]] = Counter()  # requests by route and status
        self.responses = responses or ResponseStore()
        self.database = database or Database(None, self.keys.durable_names())
        self.conversations = Conversations(self.database)
        self.files = Files(self.database)
        self.batches = Batches(self.database)
        self.batch_runner = BatchRunner(self.batches, self.database.tenant_of)
        self.agent_sessions = agent_sessions
        self.background: set[asyncio.Task[None]] = set()  # requests that no connection waits for
        self.failure: BaseException | None = None
        self._fingerprint: str | None = None
        self._loading: Loading | None = None
        self._load = None if isinstance(engine, AsyncEngine) else engine
        self._engine = engine if isinstance(engine, AsyncEngine) else None

    @property
    def engine(self) -> AsyncEngine:
        """The engine. Raises LmserveError (503) while there is none to serve with."""
        if self.draining:
            raise LmserveError.new(503, "draining", "the server is stopping and takes no new request")
        if self._engine is None:
            if self.failure is not None:
                raise LmserveError.new(503, "engine_failed", f"the model could not be loaded: {self.failure}")
            message = f"the model {self.names[0]} is being loaded"
            raise LmserveError.new(503, "loading", message, retry_after=RETRY_LOADING)
        return self._engine

    @property
    def fingerprint(self) -> str:
        """The same as long as equal seeds give equal texts: over version, model, context and chat template."""
        if self._fingerprint is not None:
            return self._fingerprint
        engine = self.engine
        template = None if engine.text is None else engine.text.template_source
        told = repr((__version__, self.names[0], engine.max_model_len, template))
        self._fingerprint = f"fp_{sha256(told.encode()).hexdigest()[:12]}"
        return self._fingerprint

    @property
    def model_fingerprint(self) -> str:
        """What tells tokens of one model, tokenizer and chat template from another's, in hexadecimal digits."""
        engine = self.engine
        if engine.fingerprint is not None:
            return engine.fingerprint.hex()
        template = None if engine.text is None else engine.text.template_source
        return sha256(repr((self.names[0], template)).encode()).hexdigest()

    def session_model(self, adapter: bytes | None) -> tuple[str, str]:
        """The name and the fingerprint of what computed a session, by the digest of its adapter.

        Raises LmserveError (409) for an adapter that is not loaded.
        """
        if adapter is None:
            return self.names[0], self.model_fingerprint
        for loaded in self._adapters():
            if loaded.digest == adapter:
                return loaded.name, self._with_adapter(adapter)
        message = "the session was computed with an adapter that is not loaded; load it first"
        raise LmserveError.new(409, "session_adapter_mismatch", message, param="session_id")

    def session_adapter(self, fingerprint: str) -> bytes | None:
        """The digest of the adapter that `session_model` gives this fingerprint for; None: it is that of none."""
        digests = (loaded.digest for loaded in self._adapters())
        return next((digest for digest in digests if self._with_adapter(digest) == fingerprint), None)

    def _with_adapter(self, digest: bytes) -> str:
        return sha256(bytes.fromhex(self.model_fingerprint) + digest).hexdigest()

    def _adapters(self) -> list[LoadedAdapter]:
        adapters = self.engine.adapters
        return [] if adapters is None else adapters.loaded()

    def check_ready(self) -> None:
        """Raises LmserveError (503) while no request would be served: loading, draining, a dead or stalled engine."""
        self.engine.check_health()

    def storage_faults(self) -> list[StorageFault]:
        """Why sessions or stored responses cannot be written down now; everything else is served."""
        sessions = None if self._engine is None else self._engine.storage_fault
        faults = (sessions, self.responses.storage_fault, self.database.fault)
        return [fault for fault in faults if fault is not None]

    def tell_of_storage(self) -> None:
        """Log that the session log fails, or is well again, if that is news. The log of responses tells by itself."""
        if self._engine is not None:
            self._engine.tell_of_storage()

    def check_alive(self) -> None:
        """Raises LmserveError (503) where only a new process helps: the engine is dead, or stands still for long."""
        if self._engine is None or self.draining:
            return
        try:
            self._engine.check_health()
        except LmserveError as error:
            stalled = error.error.get("stalled_seconds", 0)
            if error.code not in PASSING or stalled >= STALLED_FOR_GOOD:
                raise

    def has_failed(self) -> bool:
        """Whether nothing can be served any more; `failure` says why."""
        if self.failure is not None or self.draining:
            return self.failure is not None
        try:
            if self._engine is not None:
                self._engine.check_health()
            elif self._loading is not None:
                self._loading.check()
        except LmserveError as error:
            if error.code not in PASSING:
                logger.error("the server ends: %s", error)  # noqa: TRY400 - it says all there is to say
                self.failure = error
        return self.failure is not None

    def metrics(self, tenant: int) -> str:
        """Prometheus' text format, with what each key uses that a tenant may look at.

        Raises LmserveError (503) while there is no engine to serve with.
        """
        engine, faulty = self.engine, self.responses.storage_fault is not None
        keys = {name: engine.usage(number) for name, number in islice(self.keys.seen_by(tenant), MOST_KEYS)}
        return page(engine.metrics(), self.names[0], self.http, keys, response_log_faulty=faulty)

    def quota(self, tenant: int) -> dict[str, int]:
        """What a tenant may still do, of what is limited; nothing once the server stops."""
        return {} if self._engine is None else self._engine.quota(tenant)

    def with_model(self, data: RequestT) -> RequestT:
        """The request with the served model's id, where it names none. Raises LmserveError (404) for another model."""
        if not data.model:
            return msgspec.structs.replace(data, model=self.names[0])
        self.check_model(data.model)
        return data

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names of the model and of its adapters."""
        if self._engine is None:
            return self.names + self._first_adapters
        adapters = self._engine.adapters
        return self.names if adapters is None else (*self.names, *(adapter.name for adapter in adapters.loaded()))

    def adapter_or_model(self, name: str | None) -> str:
        """The name of the adapter that is meant, or else the model's id: where any name of a model is taken."""
        return name if name is not None and name not in self.names and name in self.all_names else self.names[0]

    def check_model(self, name: str) -> None:
        """Raises LmserveError (404) if the model is not served under `name`."""
        if name not in (all_names := self.all_names):
            served = ", ".join(all_names)
            message = f"the model {name!r} is not served; the served models are: {served}"
            raise LmserveError.new(404, "model_not_found", message, param="model")

    def facts_of(self, name: str) -> ModelFacts:
        """Raises LmserveError (404) for a name that is not served, and (503) while no model is loaded."""
        self.check_model(name)
        engine = self.engine
        facts = ModelFacts(self.names[0], engine.max_model_len, engine.defaults.given())
        adapter = None if engine.adapters is None or name in self.names else engine.adapters.get(name)
        return facts if adapter is None else replace(facts, parent=self.names[0], created=adapter.created)

    async def load(self) -> None:
        """Load the engine on a thread of its own, and run the batches on; sets `failure` if the first raises."""
        if self._load is None:
            await self.batch_runner.wake()
            return
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[AsyncEngine] = loop.create_future()
        # Not the loop's own pool: that is joined when the loop ends, and Ctrl-C must not wait for a model.
        self._loading, _ = begin(partial(_load_into, self._load, loaded))
        try:
            self._engine = await loaded
            await self.batch_runner.wake()
        except LmserveError as error:
            logger.error("the model could not be loaded: %s", error)  # noqa: TRY400 - it says all there is to say
            self.failure = error
        except Exception as error:
            logger.exception("the model could not be loaded")
            self.failure = error

    async def drain(self, grace: float) -> None:
        """Refuse new requests and stop the engine: running turns have `grace` seconds to end by themselves."""
        self.draining = True
        await self.batch_runner.stop()
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.shutdown(grace)

    async def close(self) -> None:
        """Stop the engine, if it was loaded here."""
        if self._load is not None:
            await self.drain(0)
        await self.batch_runner.stop()
        await self.responses.close()
        await self.database.close()


def _load_into(load: Callable[[], AsyncEngine], loaded: asyncio.Future[AsyncEngine]) -> None:
    def deliver(engine: AsyncEngine | None, error: Exception | None) -> None:
        if loaded.cancelled():
            # The server stopped meanwhile.
            if engine is not None:
                engine.stop()
        elif engine is not None:
            loaded.set_result(engine)
        elif error is not None:
            loaded.set_exception(error)

    try:
        engine, error = load(), None
    except Exception as raised:  # noqa: BLE001 - handed to the loop
        engine, error = None, raised
    try:
        loaded.get_loop().call_soon_threadsafe(deliver, engine, error)
    except RuntimeError:
        # The loop has ended, and with it the server.
        if engine is not None:
            engine.stop()


def serving_of(request: ASGIConnection[Any, Any, Any, Any]) -> Serving:
    """What serves the request: the model that it chose, where the server has several."""
    serving: Serving = request.scope["state"].get("serving") or request.app.state.serving
    return serving


def tenant_of(request: ASGIConnection[Any, Any, Any, Any]) -> int:
    """The number of the request's API key."""
    tenant: int = request.scope["state"]["tenant"]
    return tenant


def ready_for(request: ASGIConnection[Any, Any, Any, Any]) -> tuple[Serving, int]:
    """What serves the request, and its tenant. Raises LmserveError (503) while there is no engine to serve with."""
    serving = serving_of(request)
    _ = serving.engine
    return serving, tenant_of(request)
