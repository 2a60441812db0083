"""The core's asyncio interface: one reader of its wake descriptor, any number of streams, and no task of its own.

It installs no signal handler and opens no socket, so any asyncio program can use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from msgspec import structs

from lmserve.engine.adapters import Adapters, LoadedAdapter
from lmserve.engine.core import CoreEngine, CoreStream
from lmserve.engine.session_store import SharedSessions, StoredKey, Use, is_shared
from lmserve.engine.sessions import (
    SessionId,
    SessionInfo,
    SessionState,
    StateTurn,
    StorageFault,
    TranscriptTurn,
    session_info_of,
)
from lmserve.engine.stream import AsyncStream, begun
from lmserve.engine.submission import (
    EmbedSubmission,
    GuidedWhitespace,
    Messages,
    SessionRef,
    StopParams,
    Submission,
    Tokens,
    Turn,
    encode,
    with_defaults,
)
from lmserve.engine.text import TextLayer
from lmserve.errors import LmserveError
from lmserve.model.embedding import Embedding
from lmserve.model.generation_defaults import NONE, GenerationDefaults

if TYPE_CHECKING:
    from lmserve.worker.processes import Processes

logger = logging.getLogger("lmserve.engine")


# Whether the server itself submits the requests of this context. They run after all requests of clients, and do not
# count as the key's requests in flight.
in_background: ContextVar[bool] = ContextVar("in_background", default=False)

# Names the turn that this context runs in a session: 32 hexadecimal digits. If the session has that turn already, its
# answer is said again and nothing is committed. None: it has no name.
turn_key: ContextVar[str | None] = ContextVar("turn_key", default=None)

# The priority of background requests. A larger number runs later; clients may also use this one.
LAST_PRIORITY: Final = 2**31 - 1

# Seconds between two looks whether a session is free again, and the most looks, where nothing tells of it.
LOOK_AGAIN: Final = 0.02
MOST_LOOKS: Final = 500

# Routes whose requests need not name a model: a session's turn is then computed as those before it.
OF_SESSION: Final = ("generate", "interactive")


class AsyncEngine:
    """A core engine on one event loop.

    It reads the core's wake descriptor on the loop that first submits; `close` (or `shutdown`) takes the reader off.
    Not thread-safe: call everything on that loop.
    """

    def __init__(
        self,
        core: CoreEngine,
        *,
        max_model_len: int,
        text: TextLayer | None = None,
        defaults: GenerationDefaults = NONE,
        guided_whitespace: GuidedWhitespace = "compact",
        fingerprint: bytes | None = None,
        embedding: Embedding | None = None,
        processes: Processes | None = None,
        adapters: Adapters | None = None,
        shared: SharedSessions | None = None,
    ) -> None:
        """`max_model_len`: tokens that a sequence may hold, history and output together. `text`: the core's own.

        `defaults`: what holds for a request that leaves it out. `guided_whitespace`: that of JSON in guided answers,
        where a submission does not say. `fingerprint`: 32 bytes that tell tokens of one model from another's.
        `embedding`: what the model does with texts; None: it is not known, and nothing is refused for it.
        `processes`: that compute the model, where this one does not. `adapters`: None: the model takes none.
        `shared`: through which the core writes its sessions, for other servers; None: they are its own.
        """
        self.max_model_len = max_model_len
        self.text = text
        self.defaults = defaults
        self.fingerprint = fingerprint
        self.embedding = embedding
        self.adapters = adapters
        self._core = core
        self._processes = processes
        self._shared = shared
        if shared is not None:
            shared.attach(core)
        self._guided_whitespace = guided_whitespace
        self._streams: dict[int, AsyncStream] = {}
        self._releasing: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fault_told: str | None = None

    def submit(self, submission: Submission) -> AsyncStream:
        """Hand one request to the core. The caller must end the stream: read it to its end, or `abort` it.

        Raises LmserveError if the core refuses at once (invalid, 404, 409, 429, 503).
        """
        self._attach()
        self._check_processes()
        if in_background.get():
            submission = structs.replace(submission, priority=LAST_PRIORITY, background=True)
        if submission.session is not None and (key := turn_key.get()) is not None:
            submission = structs.replace(submission, turn_key=key)
        if submission.guide is not None and submission.guided_whitespace is None:
            submission = structs.replace(submission, guided_whitespace=self._guided_whitespace)
        submission = self._with_adapter(submission)
        encoded = encode(with_defaults(submission, self.defaults))
        session = None if submission.session is None else submission.session.id
        shared = None if session is None else self._shared_key(submission.tenant, session)
        if shared is not None:
            return self._follow_taken(shared, encoded)
        return self._follow(self._core.submit(encoded), session)

    def embed(self, submission: EmbedSubmission) -> AsyncStream:
        """Hand texts to embed to the core; the reply is whole. Raises LmserveError as `submit` does."""
        self._attach()
        self._check_processes()
        if self._adapter(submission.model) is not None:
            message = f"{submission.model} is an adapter, which generates text only; embeddings are the model's own"
            raise LmserveError.invalid("model", message, "unsupported_parameter")
        if in_background.get():
            submission = structs.replace(submission, background=True)
        return self._follow(self._core.embed(encode(submission)))

    def count_tokens(self, submission: Submission) -> int:
        """Tokens of the prompt that a submission would be computed for, history included; nothing is computed.

        Raises LmserveError (400, 404). It may take its time, and can be called on any thread.
        """
        if submission.session is not None:
            self._refresh(submission.tenant, submission.session.id)
        return self._core.count_tokens(encode(submission))

    def cancel_session(self, tenant: int, session_id: SessionId) -> bool:
        """The session's running turn ends with what it has. False: none runs."""
        return self._core.cancel_session(tenant, session_id)

    async def end_session(self, tenant: int, session_id: SessionId, *, cancel: bool = False) -> bool:
        """Drop the session. False: there was none. Raises LmserveError `session_busy` while a turn runs.

        `cancel`: cancel a turn that runs and wait for its end.
        """
        key = self._shared_key(tenant, session_id)
        if key is None:
            return await asyncio.to_thread(self._core.end_session, tenant, session_id, cancel)
        for _ in range(MOST_LOOKS):
            # A turn that runs here has the session until its end.
            if not (cancel and self._core.cancel_session(tenant, session_id)):
                break
            await asyncio.sleep(LOOK_AGAIN)
        async with self._taken(key):
            return await asyncio.to_thread(self._core.end_session, tenant, session_id, cancel)

    async def fork_session(
        self, tenant: int, session_id: SessionId, new_id: SessionId, turns: int | None = None
    ) -> None:
        """Make `new_id` a session that stands where the other one stood after its first `turns` turns; None: all.

        It shares what is cached of them. Ids below -1 are the server's own: no client can name them. Raises
        LmserveError: 400 for turns that are not there, 404, 409 `session_exists` or `session_busy`.
        """
        await self.refresh_session(tenant, session_id)
        async with self._taken(self._shared_key(tenant, new_id)):
            await asyncio.to_thread(self._core.fork_session, tenant, session_id, new_id, turns)

    async def rewind_session(self, tenant: int, session_id: SessionId, turns: int) -> None:
        """Take a session back to where it stood after its first `turns` turns. Raises LmserveError (400, 404, 409)."""
        async with self._taken(self._shared_key(tenant, session_id)):
            await asyncio.to_thread(self._core.rewind_session, tenant, session_id, turns)

    async def append_session(
        self, tenant: int, session_id: SessionId, added: Turn | Messages | Tokens, *, create: bool = False
    ) -> None:
        """Append messages or tokens to a session's history: the model reads them now, and generates nothing.

        `create`: begin the session where there is none. Raises LmserveError (400, 404, 409).
        """
        session = SessionRef(id=session_id, create=create)
        submission = Submission(
            route="generate", input=added, session=session, stopping=StopParams(max_tokens=0), tenant=tenant
        )
        await self.submit(submission).body()

    def session_info(self, tenant: int, session_id: SessionId) -> SessionInfo:
        """What can be said of a session without its tokens. Raises LmserveError (404)."""
        return session_info_of(self._core.session_info(tenant, session_id))

    async def refresh_session(self, tenant: int, session_id: SessionId) -> None:
        """Bring a session that others share up to date, before something is said of it. Raises LmserveError (503)."""
        if self._shared is not None:
            await asyncio.to_thread(self._refresh, tenant, session_id)

    def list_sessions(self, tenant: int, *, after: SessionId | None = None, limit: int = 100) -> list[SessionInfo]:
        """At most `limit` sessions of a tenant after id `after`, in order of their ids: numbers, then names.

        With a store that others share, all that it has. It may take its time, and can be called on any thread.
        """
        if self._shared is not None:
            return self._shared.store.list(tenant, after, limit)
        return [session_info_of(info) for info in self._core.list_sessions(tenant, after, limit)]

    def export_session(self, tenant: int, session_id: SessionId) -> SessionState:
        """All that makes a session. Raises LmserveError (404, 409 while its first turn runs).

        It may take its time, and can be called on any thread.
        """
        self._refresh(tenant, session_id)
        tokens, turns, seed, system_tokens, adapter = self._core.export_session(tenant, session_id)
        return SessionState(tokens, [StateTurn(*turn) for turn in turns], seed, system_tokens, adapter)

    def import_session(self, tenant: int, session_id: SessionId, state: SessionState) -> None:
        """Make a session of another server's. Raises LmserveError (400, 409). As `export_session`, for any thread."""
        turns: list[tuple[int, int, bool, bytes | None]] = [*state.turns]
        key, shared, use = self._shared_key(tenant, session_id), self._shared, None
        if key is not None and shared is not None:
            use = shared.take(key)
        try:
            self._core.import_session(
                tenant, session_id, state.tokens, turns, state.seed, state.system_tokens, state.adapter
            )
        finally:
            if use is not None and shared is not None:
                shared.release(use)

    def hold_session(self, tenant: int, session_id: SessionId, hold_ms: int) -> None:
        """Hold a session and its KV: evict them only after those that are not held. Raises LmserveError (404)."""
        self._core.hold_session(tenant, session_id, hold_ms)

    async def give_up_session(self, tenant: int, session_id: SessionId) -> int:
        """Give up a session's KV; return how many of its tokens are cached then. Raises LmserveError (404)."""
        return await asyncio.to_thread(self._core.give_up_session, tenant, session_id)

    async def session_transcript(self, tenant: int, session_id: SessionId) -> list[TranscriptTurn]:
        """The committed turns of a session, oldest first. Raises LmserveError (404)."""
        await self.refresh_session(tenant, session_id)
        turns = await asyncio.to_thread(self._core.session_transcript, tenant, session_id)
        return [TranscriptTurn(*turn) for turn in turns]

    def stats(self) -> dict[str, int | float]:
        return self._core.stats()

    def usage(self, tenant: int) -> dict[str, Any]:
        """What a tenant has used since the start, its limits, and what is left of them."""
        return self._core.usage(tenant)

    def quota(self, tenant: int) -> dict[str, int]:
        """What a tenant may still do, of what is limited."""
        return self._core.quota(tenant)

    def check_health(self) -> None:
        """Raises LmserveError (503): `engine_unavailable` for good, `engine_stalled` while work waits for a step,
        `worker_unavailable` while the process that computes is started again.
        """
        self._core.check_health()
        self._check_processes()

    def metrics(self) -> str:
        """Counters, gauges and latencies in Prometheus' text format."""
        page = self._core.metrics()
        if self._processes is not None:
            page += _process_metrics(self._processes)
        if self._shared is not None:
            page += _store_metrics(self._shared)
        return page

    @property
    def open_streams(self) -> int:
        """Streams that have neither ended nor been aborted."""
        return len(self._streams)

    async def shutdown(self, grace: float) -> None:
        """Refuse new requests, give running turns `grace` seconds, abort the rest, stop the engine thread."""
        if self.text is not None:
            self.text.close()
        # The core blocks until its thread has ended, and the streams' last bytes must be sent meanwhile.
        await asyncio.to_thread(self._core.shutdown, grace)
        if self._processes is not None:
            await asyncio.to_thread(self._processes.close)
        if self._shared is not None:
            await asyncio.to_thread(self._shared.store.close)
        if self._loop is not None:
            self._wake_streams()
        self.close()

    def stop(self) -> None:
        """`shutdown` without grace, for an engine that no loop has used. Blocks until the engine thread has ended."""
        self._core.shutdown(0)
        if self._processes is not None:
            self._processes.close()
        if self._shared is not None:
            self._shared.store.close()

    def close(self) -> None:
        """Take the reader off the loop; the core lives on. Idempotent."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._core.wake_fd())
        self._loop = None

    def _adapter(self, name: str) -> LoadedAdapter | None:
        return None if self.adapters is None else self.adapters.get(name)

    def _with_adapter(self, submission: Submission) -> Submission:
        """The submission with the number of the adapter that its model is."""
        loaded = self._adapter(submission.model)
        if loaded is None and submission.route in OF_SESSION:
            return submission
        return structs.replace(submission, adapter=0 if loaded is None else loaded.number)

    def _check_processes(self) -> None:
        if self._processes is not None:
            self._processes.check()

    def _attach(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("this AsyncEngine serves another event loop; close it there first")
        loop.add_reader(self._core.wake_fd(), self._wake_streams)
        self._loop = loop

    def _shared_key(self, tenant: int, session_id: SessionId) -> StoredKey | None:
        """Of a session that other servers share; None: it is this one's own."""
        if self._shared is None or not is_shared(session_id):
            return None
        return StoredKey(tenant, session_id)

    def _refresh(self, tenant: int, session_id: SessionId) -> None:
        key = self._shared_key(tenant, session_id)
        if key is not None and self._shared is not None:
            self._shared.refresh(key)

    async def _take(self, shared: SharedSessions, key: StoredKey) -> Use:
        taking = asyncio.get_running_loop().run_in_executor(None, shared.take, key)
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:

            def give_back(taken: asyncio.Future[Use]) -> None:
                if not taken.cancelled() and taken.exception() is None:
                    self._release(shared, taken.result())

            taking.add_done_callback(give_back)
            raise

    @contextlib.asynccontextmanager
    async def _taken(self, key: StoredKey | None) -> AsyncIterator[None]:
        """A shared session, to change it; None: nothing is to be taken."""
        if key is None or self._shared is None:
            yield
            return
        use = await self._take(self._shared, key)
        try:
            yield
        finally:
            self._release(self._shared, use)

    def _release(self, shared: SharedSessions, use: Use) -> None:
        if shared.drop(use):
            # Nobody waits for it: until then, other servers answer 409.
            asyncio.get_running_loop().run_in_executor(None, shared.end_lease, use)

    async def _release_when_idle(self, shared: SharedSessions, use: Use) -> None:
        """After an abort: the core ends the turn, and may keep its answer, in its next step."""
        try:
            while self.session_info(use.key.tenant, use.key.id).busy:  # noqa: ASYNC110 - the core does not tell
                await asyncio.sleep(LOOK_AGAIN)
        except LmserveError:
            pass  # it was never there, or has ended
        finally:
            self._release(shared, use)

    def _follow_taken(self, key: StoredKey, encoded: bytes) -> AsyncStream:
        """A request of a shared session: the core gets it once the session is taken."""
        shared = self._shared
        assert shared is not None
        uses: list[Use] = []

        async def begin() -> CoreStream:
            use = await self._take(shared, key)
            uses.append(use)
            try:
                return self._core.submit(encoded)
            except BaseException:
                self._release(shared, use)
                raise

        def end(aborted: bool) -> None:
            if not aborted:
                self._release(shared, uses[0])
                return
            task = asyncio.get_running_loop().create_task(self._release_when_idle(shared, uses[0]))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

        return self._begun(AsyncStream(None, self._streams, key.id, begin, end))

    def _follow(self, core: CoreStream, session: SessionId | None = None) -> AsyncStream:
        stream = AsyncStream(core, self._streams, session)
        self._streams[core.id] = stream
        return self._begun(stream)

    def _begun(self, stream: AsyncStream) -> AsyncStream:
        if (streams := begun.get()) is not None:
            streams.append(stream)
        return stream

    @property
    def storage_fault(self) -> StorageFault | None:
        """Why no turn can be written to the session log now; None: nothing is wrong, or there is no log."""
        fault = self._core.session_log_fault()
        return None if fault is None else StorageFault(*fault)

    def tell_of_storage(self) -> None:
        """Log that the disk fails, or is well again: once for each change.

        The wake descriptor reports only streams, so the server must call this from time to time.
        """
        fault = self.storage_fault
        code = None if fault is None else fault.code
        if code == self._fault_told:
            return
        self._fault_told = code
        if fault is None:
            logger.warning("the session log can be written again")
        else:
            logger.error("%s; turns of sessions are refused (%s) until the disk works again", fault.message, fault.code)

    def _wake_streams(self) -> None:
        self.tell_of_storage()
        streams = self._streams
        for stream_id in self._core.drain():
            stream = streams.get(stream_id)
            if stream is not None:
                stream.wake()


def _process_metrics(processes: Processes) -> str:
    """Of the processes that compute, in Prometheus' text format."""
    running, restarts = len(processes.pids), processes.restarts
    return (
        "# HELP lmserve_worker_processes Processes that compute the model now.\n"
        "# TYPE lmserve_worker_processes gauge\n"
        f"lmserve_worker_processes {running}\n"
        "# HELP lmserve_worker_restarts_total How often these processes have ended and been started again.\n"
        "# TYPE lmserve_worker_restarts_total counter\n"
        f"lmserve_worker_restarts_total {restarts}\n"
    )


def _store_metrics(shared: SharedSessions) -> str:
    """Of the store that several servers share, in Prometheus' text format."""
    counters = shared.counters
    return "".join(
        f"# HELP lmserve_session_store_{name}_total {help_text}\n"
        f"# TYPE lmserve_session_store_{name}_total counter\n"
        f"lmserve_session_store_{name}_total {value}\n"
        for name, help_text, value in (
            ("writes", "Changes of sessions that were written to the shared store.", counters.writes),
            ("written_bytes", "Bytes of these.", counters.written_bytes),
            ("loads", "Sessions that were loaded from the shared store.", counters.loads),
            ("loaded_bytes", "Bytes of these.", counters.loaded_bytes),
            ("refused", "Turns refused because another server, or another request, had the session.", counters.refused),
        )
    )
