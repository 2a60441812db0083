"""The process that loads a model and computes its steps: `python -m lmserve.worker.child DESCRIPTOR PARENT`."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Final

import msgspec

from lmserve._core import StepMasks
from lmserve.errors import LmserveError
from lmserve.model.checkpoint import open_checkpoint
from lmserve.model.errors import CheckpointError
from lmserve.model.fingerprint import fingerprint
from lmserve.model.interface import F32, LogitEdits, Masks, Runner
from lmserve.model.load import load_runner
from lmserve.model.options import RunnerOptions
from lmserve.model.shares import Place, Share
from lmserve.model.step_message import StepOutcome, StepPlan
from lmserve.worker.adapters import ReceivedAdapters
from lmserve.worker.errors import PipeError
from lmserve.worker.messages import Ready, Refused, Start, Texts, Vectors, decode, encode
from lmserve.worker.pipe import Kind, Pipe

logger = logging.getLogger("lmserve.worker")

_PR_SET_PDEATHSIG: Final = 1


def main() -> int:
    """Compute what comes through the inherited descriptor, until it ends."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    # Ctrl-C goes to every process of a terminal; this one ends when the server does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints must not get among the server's own output.
    os.dup2(2, 1)
    pipe = Pipe(socket.socket(fileno=descriptor))
    try:
        loaded = load(pipe)
        if loaded is None:
            return 1
        runner, rank = loaded
        passes, adapters = Passes(runner), ReceivedAdapters(runner)
        while True:
            answer(pipe, runner, passes, adapters, rank)
    except PipeError as error:
        logger.debug("the worker process ends: %s", error)
        return 0


def die_with(parent: int) -> None:
    """Let the system kill this process when its parent ends, however that ends. Linux has that; a pipe's end does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It ended before that was asked for.
        sys.exit(1)


def load(pipe: Pipe) -> tuple[Runner, int] | None:
    """The model that the first frame names, and this process's rank; None: it was refused. Raises PipeError."""
    try:
        start = decode(pipe.expect(Kind.START), type=Start)
        checkpoint = open_checkpoint(start.model, mtp=bool(start.options.get("mtp")))
        if fingerprint(checkpoint) != start.fingerprint:
            raise CheckpointError(f"{start.model} is not the model any more that the server was started with")
        options = RunnerOptions(**start.options)
        place = Place(Share(start.rank, options.tensor_parallel), start.store) if start.store else None
        runner = load_runner(checkpoint, options, place)
    except LmserveError as error:
        pipe.send(Kind.REFUSED, encode(Refused.of(error)))
        return None
    except (msgspec.DecodeError, TypeError, ValueError, OSError, RuntimeError, MemoryError) as error:
        traceback.print_exc()
        refused = LmserveError.new(500, "internal_error", f"the model could not be loaded: {error}")
        pipe.send(Kind.REFUSED, encode(Refused.of(refused)))
        return None
    pipe.send(Kind.READY, encode(Ready.of(runner.info, runner.buffers)))
    return runner, start.rank


class Passes:
    """The passes of the texts that a frame brought: other texts take their place, whatever was left."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._left: Iterator[F32 | None] = iter(())

    def begin(self, body: bytes) -> None:
        """Take the texts of a frame."""
        texts = decode(body, type=Texts).arrays()
        passes = getattr(self._runner, "embed_passes", None)
        self._left = iter((self._runner.embed(*texts),)) if passes is None else passes(*texts)

    def next(self) -> tuple[Kind, bytes]:
        """Compute a pass. Raises PipeError where none is left."""
        for vectors in self._left:
            return (Kind.PART, b"") if vectors is None else (Kind.VECTORS, encode(Vectors.of(vectors)))
        raise PipeError("it was to go on with texts, but there are none")


def answer(pipe: Pipe, runner: Runner, passes: Passes, adapters: ReceivedAdapters, rank: int) -> None:
    """Compute what the next frame asks for. Raises PipeError for a frame that asks for nothing."""
    kind, body = pipe.receive()
    while kind == Kind.MODULE:
        adapters.add(body)
        kind, body = pipe.receive()
    if kind not in (Kind.STEP, Kind.EMBED, Kind.GO_ON, Kind.ADAPTER):
        raise PipeError(f"it was sent {kind.name} where a step was due")
    try:
        if kind == Kind.STEP:
            reply = Kind.OUTCOME, encode(run_step(pipe, runner, body, samples=rank == 0))
        elif kind == Kind.ADAPTER:
            adapters.name(body)
            reply = Kind.DONE, b""
        else:
            if kind == Kind.EMBED:
                passes.begin(body)
            reply = passes.next()
    except PipeError:
        raise
    except Exception as error:  # noqa: BLE001 - the server decides what becomes of the requests
        traceback.print_exc()
        reply = Kind.FAILED, f"{type(error).__name__}: {error}".encode()
    pipe.send(*(reply if rank == 0 or reply[0] == Kind.FAILED else (Kind.DONE, b"")))


def run_step(pipe: Pipe, runner: Runner, body: bytes, *, samples: bool) -> StepOutcome:
    """Run the step of a frame. Where this rank samples, masks follow in a frame of their own, whatever happens."""
    plan = decode(body, type=StepPlan)
    masks = PipedMasks(pipe, plan.masked) if plan.masked and samples else None
    try:
        plan.write(runner.buffers)
        runner.launch(*plan.sizes, _edits(plan, runner, masks) if samples else None)
        runner.collect()
        return StepOutcome.of(runner.buffers, plan.rows, None)
    finally:
        if masks is not None:
            masks.wait()


class PipedMasks:
    """Masks that the server still computes while the model runs; see `Masks`."""

    def __init__(self, pipe: Pipe, rows: list[int]) -> None:
        self.rows = rows
        self._pipe = pipe
        self._masks: bytearray | None = None

    def wait(self) -> bytearray:
        """See `Masks`. Raises PipeError."""
        if self._masks is None:
            self._masks = bytearray(self._pipe.expect(Kind.MASKS))
        return self._masks


def _edits(plan: StepPlan, runner: Runner, masks: PipedMasks | None) -> LogitEdits | None:
    given: Masks | None = masks
    if masks is not None and hasattr(runner, "native"):
        # The core's kernels read masks of the core alone.
        given = StepMasks(masks.rows, bytes(masks.wait()))
    return plan.logit_edits(given)


if __name__ == "__main__":
    sys.exit(main())
