"""A `Runner` whose model is in other processes."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Self

import msgspec

from lmserve.errors import LmserveError
from lmserve.model.adapter_files import Adapter
from lmserve.model.checkpoint import Checkpoint
from lmserve.model.fingerprint import fingerprint
from lmserve.model.interface import F32, I32, LogitEdits, RunnerInfo, StepBuffers
from lmserve.model.options import RunnerOptions
from lmserve.model.step_message import StepOutcome, StepPlan, encode
from lmserve.worker.adapters import SentAdapters
from lmserve.worker.errors import PipeError, memory_lost, unavailable
from lmserve.worker.messages import Start, Texts, Vectors, decode
from lmserve.worker.pipe import Kind
from lmserve.worker.processes import Group, Processes


class ProcessRunner:
    """Sends each step to the processes that compute the model, and lays their outcome into its own buffers.

    When they have ended, a step fails with `worker_unavailable` until they run again. The first step of new processes,
    of which the engine has not heard yet, fails with `memory_lost`: their KV cache is empty.
    """

    def __init__(self, processes: Processes, info: RunnerInfo, buffers: StepBuffers) -> None:
        self.info = info
        self.buffers = buffers
        self.processes = processes
        # Whose memory the engine knows of; None: it has heard that it is lost.
        self._known: Group | None = processes.group()
        self._launched: tuple[Group, int, LogitEdits | None] | None = None
        self._adapters = SentAdapters()
        # The engine drops its runner when it stops.
        weakref.finalize(self, processes.close)

    @classmethod
    def start(cls, checkpoint: Checkpoint, options: RunnerOptions) -> Self:
        """Start the processes and wait until they have loaded the model. Raises LmserveError."""
        start = Start(
            model=str(checkpoint.path.resolve()),
            fingerprint=fingerprint(checkpoint),
            options=dataclasses.asdict(options),
        )
        processes = Processes(start)
        ready = processes.open()
        return cls(processes, ready.info, ready.buffers())

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """See `TakesAdapters`. The processes get it before the first step that needs it."""
        self._adapters.load(number, adapter)

    def unload_adapter(self, number: int) -> None:
        """See `TakesAdapters`."""
        self._adapters.unload(number)

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        """Send the step; see `Runner`.

        Raises LmserveError as the class says, or RuntimeError if the model cannot take an adapter of the step.
        """
        try:
            group = self.processes.group()
        except LmserveError:
            self._known = None
            raise
        if self._known is not group:
            known, self._known = self._known, group
            if known is not None:
                raise memory_lost()
        plan = StepPlan.of(self.buffers, (n_tokens, n_seqs, n_rows), edits, self.info.block_size)
        try:
            self._adapters.send(group, set(self.buffers.adapters[:n_seqs].tolist()))
            group.send(Kind.STEP, encode(plan))
        except PipeError as error:
            self._known = None
            raise unavailable(group.fail(error)) from error
        self._launched = group, n_rows, edits

    def collect(self) -> None:
        """Wait for the step's outcome; see `Runner`. Raises LmserveError, or RuntimeError if the model fails."""
        if self._launched is None:
            raise RuntimeError("no step was launched")
        (group, rows, edits), self._launched = self._launched, None
        try:
            if edits is not None and edits.masks is not None and edits.masks.rows:
                group.send_masks(bytes(edits.masks.wait()))
            _read_outcome(group.answer(Kind.OUTCOME), self.buffers, rows)
        except PipeError as error:
            self._known = None
            raise unavailable(group.fail(error)) from error

    def embed(self, token_ids: I32, cu_seqlens: I32) -> F32:
        """See `Runner`. Raises LmserveError, or RuntimeError if the model fails."""
        return next(found for found in self.embed_passes(token_ids, cu_seqlens) if found is not None)

    def embed_passes(self, token_ids: I32, cu_seqlens: I32) -> Iterator[F32 | None]:
        """What `embed` gives, after a None for each pass but the last. Steps may run between two passes."""
        group = self.processes.group()
        request = Kind.EMBED, encode(Texts.of(token_ids, cu_seqlens))
        while True:
            try:
                group.send(*request)
                kind, body = group.answer_of((Kind.VECTORS, Kind.PART))
                vectors = _read_vectors(body).copy() if kind == Kind.VECTORS else None
            except PipeError as error:
                # The engine has not heard that the KV cache is lost: the next step says so.
                raise unavailable(group.fail(error)) from error
            yield vectors
            if vectors is not None:
                return
            request = Kind.GO_ON, b""


def _read_outcome(body: bytes, buffers: StepBuffers, rows: int) -> None:
    try:
        decode(body, type=StepOutcome).write(buffers, rows)
    except (msgspec.DecodeError, ValueError, KeyError, AttributeError) as error:
        raise PipeError(f"its outcome cannot be read: {error}") from error


def _read_vectors(body: bytes) -> F32:
    try:
        return decode(body, type=Vectors).array()
    except (msgspec.DecodeError, ValueError) as error:
        raise PipeError(f"its vectors cannot be read: {error}") from error
