"""Records the steps of a runner, and runs them again."""

from __future__ import annotations

import dataclasses
import logging
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import msgspec
from msgspec import Struct

from lmserve.errors import LmserveError
from lmserve.model.adapter_files import Adapter
from lmserve.model.checkpoint import Checkpoint, open_checkpoint
from lmserve.model.errors import AdapterError
from lmserve.model.fingerprint import fingerprint
from lmserve.model.interface import F32, I32, LogitEdits, Runner, RunnerInfo, taking_adapters
from lmserve.model.load import load_runner
from lmserve.model.options import RunnerOptions
from lmserve.model.step_message import StepOutcome, StepPlan, encode

logger = logging.getLogger("lmserve.engine")

MAGIC: Final = b"lmserve steps 1\n"
MAX_BYTES: Final = 4 << 30
_LENGTH: Final = struct.Struct("<I")


class RecordingError(LmserveError):
    """A file that is no recording, or that cannot be read or written."""

    def __init__(self, message: str) -> None:
        super().__init__(
            400, {"message": message, "type": "invalid_request_error", "param": "record", "code": "invalid_value"}
        )


class Header(Struct, frozen=True, kw_only=True):
    """The model of a recording and how it ran: the values of `RunnerOptions`, as far as they change a step."""

    model: str
    fingerprint: bytes
    num_blocks: int
    block_size: int
    num_window_blocks: int = 0
    options: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: RunnerOptions, info: RunnerInfo) -> Self:
        """That of a runner that was loaded from `checkpoint` with `options`."""
        return cls(
            model=str(checkpoint.path.resolve()),
            fingerprint=fingerprint(checkpoint),
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            num_window_blocks=info.num_window_blocks,
            options=dataclasses.asdict(options)
            | info.sizes
            # It is run again in one process, which has the KV cache of all ranks, and not by a path of this machine.
            | {"weights_cache": None, "tensor_parallel": 1, "kv_memory": info.kv_memory * options.tensor_parallel},
        )

    def open(self, path: Path) -> Checkpoint:
        """The model at `path`. Raises RecordingError if it is another one than was recorded."""
        checkpoint = open_checkpoint(path, mtp=bool(self.options.get("mtp")))
        if fingerprint(checkpoint) != self.fingerprint:
            raise RecordingError(f"{path} is not the model that was recorded, {self.model}")
        return checkpoint

    def load(self, checkpoint: Checkpoint, **changes: Any) -> Runner:
        """A runner as the recorded one. `changes` of its options: another device, say."""
        runner = load_runner(checkpoint, RunnerOptions(**self.options | changes))
        info = runner.info
        enough = info.num_blocks >= self.num_blocks and info.num_window_blocks >= self.num_window_blocks
        if not enough or info.block_size != self.block_size:
            has = f"{info.num_blocks} and {info.num_window_blocks} blocks of {info.block_size} tokens"
            needs = f"{self.num_blocks} and, with a window, {self.num_window_blocks} blocks of {self.block_size} tokens"
            raise RecordingError(f"the recording needs {needs}, not {has}")
        return runner


class AdapterFrame(Struct, frozen=True, kw_only=True):
    """An adapter that steps may have from now on, or may not any more (no path)."""

    adapter: int  # its number
    path: str | None = None
    digest: bytes = b""


class Recorder:
    """A `Runner` that runs another's steps, and writes each down: the plan before it runs, the outcome after.

    A file that cannot be written, or that has become too large, ends the recording, not the step.
    """

    def __init__(self, runner: Runner, path: Path, header: Header, *, max_bytes: int = MAX_BYTES) -> None:
        """Raises RecordingError if the file cannot be made."""
        self.info = runner.info
        self.buffers = runner.buffers
        self._runner = runner
        self._path = path
        self._left = max_bytes
        self._launched: tuple[int, LogitEdits | None] = (0, None)
        # Adapters come and go on other threads than the engine's.
        self._lock = threading.Lock()
        try:
            self._file: BinaryIO | None = path.open("wb")
        except OSError as error:
            raise RecordingError(f"{path} cannot be written: {error.strerror}") from error
        self._write(MAGIC)
        self._write_frame(header)

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        """Write the plan down and start the step; see `Runner`."""
        if self._file is not None:
            self._write_frame(StepPlan.of(self.buffers, (n_tokens, n_seqs, n_rows), edits, self.info.block_size))
        self._launched = (n_rows, edits)
        self._runner.launch(n_tokens, n_seqs, n_rows, edits)

    def collect(self) -> None:
        """Wait for the step and write its outcome down; see `Runner`."""
        self._runner.collect()
        if self._file is not None:
            rows, edits = self._launched
            masks = bytes(edits.masks.wait()) if edits is not None and edits.masks is not None else None
            self._write_frame(StepOutcome.of(self.buffers, rows, masks))

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """See `TakesAdapters`. Its path and digest are written down, not what it contains."""
        taking_adapters(self._runner).load_adapter(number, adapter)
        self._write_frame(AdapterFrame(adapter=number, path=str(adapter.path.resolve()), digest=adapter.digest))

    def unload_adapter(self, number: int) -> None:
        """See `TakesAdapters`."""
        self._write_frame(AdapterFrame(adapter=number))
        taking_adapters(self._runner).unload_adapter(number)

    @property
    def embed_passes(self) -> Callable[[I32, I32], Iterator[F32 | None]]:
        """That of the runner. Raises AttributeError where it computes texts whole."""
        passes: Callable[[I32, I32], Iterator[F32 | None]] = self._runner.embed_passes  # type: ignore[attr-defined]
        return passes

    def embed(self, token_ids: I32, cu_seqlens: I32) -> F32:
        """Embed; it is not recorded, for it touches no KV cache. See `Runner`."""
        return self._runner.embed(token_ids, cu_seqlens)

    def _write_frame(self, message: Struct) -> None:
        body = encode(message)
        self._write(_LENGTH.pack(len(body)) + body)

    def _write(self, data: bytes) -> None:
        with self._lock:
            self._append(data)

    def _append(self, data: bytes) -> None:
        if self._file is None:
            return
        self._left -= len(data)
        if self._left < 0:
            self._end("it has reached its limit in bytes")
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self._end(f"it cannot be written: {error.strerror}")

    def _end(self, why: str) -> None:
        logger.error("the recording %s ends here: %s", self._path, why)
        self._file = None


class Recording:
    """A recording as it lies in a file. A torn end, as a crash leaves it, ends it."""

    def __init__(self, path: Path) -> None:
        """Raises RecordingError if the file is no recording."""
        try:
            self._data = path.read_bytes()
        except OSError as error:
            raise RecordingError(f"{path} cannot be read: {error.strerror}") from error
        if not self._data.startswith(MAGIC):
            raise RecordingError(f"{path} is not a recording of lmserve serve --record")
        frames = self._frames()
        try:
            self.header = msgspec.msgpack.decode(next(frames, b""), type=Header)
        except msgspec.DecodeError as error:
            raise RecordingError(f"{path}: its header cannot be read: {error}") from error

    def _frames(self) -> Iterator[bytes]:
        at = len(MAGIC)
        while at + _LENGTH.size <= len(self._data):
            (length,) = _LENGTH.unpack_from(self._data, at)
            at += _LENGTH.size
            if at + length > len(self._data):
                return
            yield self._data[at : at + length]
            at += length

    def steps(self) -> Iterator[tuple[StepPlan, StepOutcome | None]]:
        """Each step; one that never ended has no outcome. Raises RecordingError for a step that cannot be read."""
        for each in self.events():
            if not isinstance(each, AdapterFrame):
                yield each

    def events(self) -> Iterator[tuple[StepPlan, StepOutcome | None] | AdapterFrame]:
        """Each step, and each adapter that came or went before it. Raises as `steps`."""
        frames = self._frames()
        next(frames)
        plan: StepPlan | None = None
        number = 0
        try:
            for frame in frames:
                number += 1
                # A step that failed has no outcome: another plan follows its own.
                message = msgspec.msgpack.decode(frame, type=dict[str, Any])
                if "adapter" in message:
                    # Of a step that runs meanwhile no sequence has it.
                    yield msgspec.convert(message, AdapterFrame)
                elif "inputs" in message:
                    if plan is not None:
                        yield plan, None
                    plan = msgspec.convert(message, StepPlan)
                elif plan is not None:
                    yield plan, msgspec.convert(message, StepOutcome)
                    plan = None
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise RecordingError(f"frame {number} of the recording cannot be read: {error}") from error
        if plan is not None:
            yield plan, None


@dataclass(frozen=True, slots=True)
class Difference:
    """A row whose token was another one when it was run again."""

    step: int
    row: int
    recorded: int
    found: int


@dataclass(frozen=True, slots=True)
class Replayed:
    """What running a recording again came to."""

    steps: int
    rows: int
    differences: list[Difference]


def replay(recording: Recording, runner: Runner, open_adapter: Callable[[str], Adapter]) -> Replayed:
    """Run every step of a recording again and compare the sampled tokens.

    A step without an outcome is run too: in it the recorded server failed.
    `open_adapter`: reads an adapter by its path. Raises AdapterError for one that is not what was recorded.
    """
    steps = rows = 0
    differences: list[Difference] = []
    for event in recording.events():
        if isinstance(event, AdapterFrame):
            _change_adapter(runner, event, open_adapter)
            continue
        plan, outcome = event
        plan.write(runner.buffers)
        runner.launch(*plan.sizes, plan.logit_edits(outcome.masks if outcome is not None else None))
        runner.collect()
        if outcome is not None:
            found = runner.buffers.sampled[: plan.rows]
            for row, (before, now) in enumerate(zip(outcome.sampled(), found, strict=True)):
                if before != now:
                    differences.append(Difference(steps, row, int(before), int(now)))
        steps += 1
        rows += plan.rows
    return Replayed(steps, rows, differences)


def _change_adapter(runner: Runner, event: AdapterFrame, open_adapter: Callable[[str], Adapter]) -> None:
    takes = taking_adapters(runner)
    if event.path is None:
        takes.unload_adapter(event.adapter)
        return
    adapter = open_adapter(event.path)
    if adapter.digest != event.digest:
        raise AdapterError(f"{event.path} is not the adapter that was recorded")
    takes.load_adapter(event.adapter, adapter)
