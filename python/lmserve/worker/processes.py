"""The processes that compute a model: started, watched, and started again when one of them ends."""

from __future__ import annotations

import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Final

import msgspec
from msgspec import structs

from lmserve.errors import LmserveError
from lmserve.model.checkpoint_share import rank_device
from lmserve.worker.errors import PipeEndedError, PipeError, unavailable
from lmserve.worker.messages import Ready, Refused, Start, decode, encode
from lmserve.worker.pipe import Kind, Pipe

logger = logging.getLogger("lmserve.engine")

# Seconds before a process is started again: none at first, then more each time, until one has lived long enough.
BACKOFF: Final = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
LONG_LIFE: Final = 60.0
CHILD: Final = "lmserve.worker.child"
END_SECONDS: Final = 3.0  # that a process has to end by itself
EXIT_SECONDS: Final = 1.0  # from the end of its connection to its own


class Child:
    """One process, and the pipe to it."""

    def __init__(self) -> None:
        """Start it. The system kills it when the thread that calls this ends."""
        ours, theirs = socket.socketpair()
        self.pipe = Pipe(ours)
        descriptor = theirs.fileno()
        # -P: no module of the folder in which the server was started takes the place of one of ours.
        words = [sys.executable, "-P", "-m", CHILD, str(descriptor), str(os.getpid())]
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - this very program
                words, stdin=subprocess.DEVNULL, pass_fds=(descriptor,), start_new_session=True
            )


class Group:
    """Processes that compute one model together, each a rank. The end of one is the end of all."""

    def __init__(self, start: Start) -> None:
        """Start them. The system kills them when the thread that calls this ends."""
        self.ended = threading.Event()
        self.why = ""
        self._lock = threading.Lock()
        self._start = start
        self._ranks = int(start.options["tensor_parallel"])
        # Only this user can read it.
        self._folder = Path(tempfile.mkdtemp(prefix="lmserve-ranks-")) if self._ranks > 1 else None
        self._children = [Child() for _ in range(self._ranks)]
        self._running = self._ranks
        for rank in range(self._ranks):
            threading.Thread(target=self._watch, args=(rank,), name="worker-watch", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """The processes, by rank."""
        return [child.process.pid for child in self._children]

    def load(self) -> Ready:
        """Wait until all have loaded the model. Raises LmserveError if it is refused, PipeError if a process ends."""
        for rank, child in enumerate(self._children):
            child.pipe.send(Kind.START, encode(self._start_of(rank)))
        ready: dict[int, Ready] = {}
        for rank, kind, body in self._frames():
            try:
                if kind == Kind.REFUSED:
                    refused = decode(body, type=Refused)
                    raise LmserveError(refused.status, refused.error)
                if kind != Kind.READY:
                    raise PipeError(f"it sent {kind.name} where {Kind.READY.name} was due")
                ready[rank] = decode(body, type=Ready)
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                raise PipeError(f"its first message cannot be read: {error}") from error
        if any(each.arrays != ready[0].arrays or each.info.sizes != ready[0].info.sizes for each in ready.values()):
            raise PipeError("the ranks have planned different sizes")
        return ready[0]

    def send(self, kind: Kind, body: bytes) -> None:
        """Send a frame to every process. Raises PipeError."""
        for child in self._children:
            child.pipe.send(kind, body)

    def send_masks(self, body: bytes) -> None:
        """Send masks to rank 0, which samples. Raises PipeError."""
        self._children[0].pipe.send(Kind.MASKS, body)

    def answer(self, due: Kind) -> bytes:
        """Wait for all processes. Raises PipeError, or RuntimeError if the model fails where it is one process."""
        return self.answer_of((due,))[1]

    def answer_of(self, due: tuple[Kind, ...]) -> tuple[Kind, bytes]:
        """What rank 0 answers, one of the kinds that are due. Raises as `answer`."""
        answered = due[0], b""
        for rank, kind, body in self._frames():
            if kind == Kind.FAILED:
                why = body.decode(errors="replace")
                if self._ranks == 1:
                    raise RuntimeError(why)
                # The others may wait for it.
                raise PipeError(f"rank {rank} failed: {why}")
            expected = (Kind.DONE,) if rank else due
            if kind not in expected:
                raise PipeError(f"it sent {kind.name} where {expected[0].name} was due")
            answered = answered if rank else (kind, body)
        return answered

    def kill(self, why: str) -> None:
        """End the processes at once. The first reason is kept."""
        with self._lock:
            self.why = self.why or why
        for child in self._children:
            child.pipe.end()
            child.process.kill()

    def fail(self, error: PipeError) -> str:
        """End the processes because of what came through a pipe. Returns the reason."""
        if isinstance(error, PipeEndedError):
            # How it ended says more than that it did.
            deadline = time.monotonic() + EXIT_SECONDS
            while not self.why and time.monotonic() < deadline:
                self.ended.wait(0.01)
        self.kill(str(error))
        self.ended.wait(END_SECONDS)
        return self.why

    def stop(self) -> None:
        """Let the processes end, and wait for that."""
        with self._lock:
            self.why = self.why or "it was told to stop"
        for child in self._children:
            child.pipe.end()
        if not self.ended.wait(END_SECONDS):
            self.kill("it did not stop")
            self.ended.wait()

    def _start_of(self, rank: int) -> Start:
        if self._folder is None:
            return self._start
        device = rank_device(self._start.options["device"], rank)
        options = self._start.options | {"device": device}
        return structs.replace(self._start, options=options, rank=rank, store=str(self._folder / "store"))

    def _frames(self) -> Iterator[tuple[int, Kind, bytes]]:
        """The next frame of each rank, as they come. Raises PipeError."""
        with selectors.DefaultSelector() as selector:
            for rank, child in enumerate(self._children):
                selector.register(child.pipe, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    yield key.data, *self._children[key.data].pipe.receive()

    def _watch(self, rank: int) -> None:
        process = self._children[rank].process
        code = process.wait()
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        which = f"rank {rank}, process {process.pid}," if self._ranks > 1 else f"process {process.pid}"
        self.kill(f"{which} ended with {how}")
        with self._lock:
            self._running -= 1
            last = not self._running
        if last:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self.ended.set()


class Processes:
    """Keeps a `Group` running for as long as the server runs."""

    def __init__(self, start: Start) -> None:
        self.restarts = 0
        self._start = start
        self._first: Ready | None = None
        self._group: Group | None = None  # that computes
        self._starting: Group | None = None
        self._why = "it is being started"
        self._closing = threading.Event()
        self._lock = threading.Lock()

    def open(self) -> Ready:
        """Start the first processes and wait until they have loaded the model. Raises LmserveError."""
        loaded: Future[Ready] = Future()
        # The system kills a process when the thread that started it ends: this one stays.
        threading.Thread(target=self._keep, args=(loaded,), name="worker-keep", daemon=True).start()
        return loaded.result()

    def group(self) -> Group:
        """The processes that compute. Raises LmserveError (503) while there are none."""
        group = self._group
        if group is None or group.ended.is_set():
            raise unavailable(self._why if group is None else group.why)
        return group

    def check(self) -> None:
        """Raises LmserveError (503) while the processes are down."""
        self.group()

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        group = self._group
        return [] if group is None or group.ended.is_set() else group.pids

    def close(self) -> None:
        """End the processes, and start no others. Idempotent."""
        with self._lock:
            self._closing.set()
            groups = self._group, self._starting
        for group in groups:
            if group is not None:
                group.stop()

    def _keep(self, loaded: Future[Ready]) -> None:
        failures = 0
        while not self._closing.wait(BACKOFF[min(failures, len(BACKOFF) - 1)]):
            began = time.monotonic()
            try:
                group = self._begin(loaded)
            except (LmserveError, PipeError, OSError) as error:
                if not loaded.done():
                    loaded.set_exception(error if isinstance(error, LmserveError) else _not_started(error))
                    return
                self._why = str(error)
                logger.error("the process that computes the model could not be started: %s", error)  # noqa: TRY400 - it says all there is to say
                failures += 1
                continue
            group.ended.wait()
            self._group, self._why = None, group.why
            if self._closing.is_set():
                return
            self.restarts += 1
            logger.error("the process that computes the model is down, and is started again: %s", group.why)
            failures = 0 if time.monotonic() - began > LONG_LIFE else failures + 1
        if not loaded.done():
            loaded.set_exception(_not_started("the server stops"))

    def _begin(self, loaded: Future[Ready]) -> Group:
        group = Group(self._start)
        with self._lock:
            self._starting = group
        if self._closing.is_set():
            group.stop()
        try:
            ready = group.load()
            self._check_same(ready)
        except PipeError as error:
            raise PipeError(group.fail(error)) from error
        except LmserveError as error:
            group.kill(str(error))
            group.ended.wait()
            raise
        if self._first is None:
            self._first = ready
            # Later ones must have as much room, whatever memory is free then.
            options = self._start.options | ready.info.sizes
            self._start = structs.replace(self._start, options=options)
        # A new group is there before the first one is handed out: whoever waits for that may use it at once.
        with self._lock:
            self._group, self._starting = group, None
        if not loaded.done():
            loaded.set_result(ready)
        return group

    def _check_same(self, ready: Ready) -> None:
        first = self._first
        if first is None or ready == first:
            return
        sizes = ready.info.num_blocks, ready.info.num_window_blocks, ready.info.state_slots
        needed = first.info.num_blocks, first.info.num_window_blocks, first.info.state_slots
        if ready.arrays != first.arrays or any(has < needs for has, needs in zip(sizes, needed, strict=True)):
            raise LmserveError.new(
                500, "internal_error", f"it has room for {sizes} blocks, window blocks and states, not for {needed}"
            )


def _not_started(why: object) -> LmserveError:
    message = f"the process that computes the model could not be started: {why}"
    return LmserveError.new(500, "internal_error", message)
