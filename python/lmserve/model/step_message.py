"""A step as a message: everything that a runner gets and everything that it returns, as bytes.

Nothing else passes between the engine and a runner, so a step can be written to a file and run again, or be sent to a
runner in another process.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final, Self

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from lmserve._core import StepMasks
from lmserve.model.interface import LogitEdits, Masks, StepBuffers

# What the first dimension of each array counts. A step uses as many entries as it has of these.
INPUTS: Final = {
    "token_ids": "tokens",
    "positions": "tokens",
    "slots": "tokens",
    "query_start": "bounds",
    "context_lens": "sequences",
    "block_tables": "sequences",
    "state_from": "sequences",
    "state_to": "sequences",
    "state_tokens": "sequences",
    "copied_blocks": "sequences",
    "adapters": "sequences",
    "window_slots": "tokens",
    "window_tables": "sequences",
    "next_tokens": "sequences",
    "sample_rows": "rows",
    "temperature": "rows",
    "top_k": "rows",
    "top_p": "rows",
    "min_p": "rows",
    "repetition_penalty": "rows",
    "presence_penalty": "rows",
    "frequency_penalty": "rows",
    "uniform": "rows",
    "logprobs": "rows",
}
OUTPUTS: Final = ("sampled", "sampled_logprob", "top_ids", "top_logprobs", "drafts")
EDITS: Final = tuple(field.name for field in fields(LogitEdits) if field.name != "masks")


class StepPlan(Struct, frozen=True, kw_only=True):
    """What a step computes: the entries of `StepBuffers` and `LogitEdits` that it uses, in native byte order."""

    tokens: int
    sequences: int
    rows: int
    blocks: int  # of the longest sequence
    inputs: dict[str, bytes]
    edits: dict[str, bytes] | None
    masked: list[int] | None  # rows whose masks follow

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, sequences and sampled rows, as `Runner.launch` takes them."""
        return self.tokens, self.sequences, self.rows

    @classmethod
    def of(cls, buffers: StepBuffers, sizes: tuple[int, int, int], edits: LogitEdits | None, block_size: int) -> Self:
        """The plan that lies in `buffers`."""
        tokens, sequences, rows = sizes
        longest = int(buffers.context_lens[:sequences].max(initial=0))
        blocks = -(-longest // block_size)
        return cls(
            tokens=tokens,
            sequences=sequences,
            rows=rows,
            blocks=blocks,
            inputs={name: _used(buffers, name, sizes, blocks).tobytes() for name in INPUTS},
            edits=None if edits is None else {name: getattr(edits, name).tobytes() for name in EDITS},
            masked=None if edits is None or edits.masks is None else list(edits.masks.rows),
        )

    def write(self, buffers: StepBuffers) -> None:
        """Lay the plan into `buffers`."""
        for name, data in self.inputs.items():
            used = _used(buffers, name, self.sizes, self.blocks)
            used[...] = np.frombuffer(data, used.dtype).reshape(used.shape)

    def logit_edits(self, masks: bytes | Masks | None) -> LogitEdits | None:
        """The plan's edits, with the masks of its outcome or those that are computed meanwhile."""
        if self.edits is None:
            return None
        given = masks
        if isinstance(given, bytes):
            given = StepMasks(self.masked, given) if self.masked else None
        # Arrays that may be written, as those of the engine.
        arrays: dict[str, Any] = {
            name: np.frombuffer(bytearray(self.edits[name]), np.float32 if name == "bias_value" else np.int32)
            for name in EDITS
        }
        return LogitEdits(**arrays, masks=given)


class StepOutcome(Struct, frozen=True, kw_only=True):
    """What a step answers: the outputs of `StepBuffers` for its rows, and the masks that were in force."""

    outputs: dict[str, bytes]
    masks: bytes | None

    @classmethod
    def of(cls, buffers: StepBuffers, rows: int, masks: bytes | None) -> Self:
        """The outcome that lies in `buffers`."""
        return cls(outputs={name: getattr(buffers, name)[:rows].tobytes() for name in OUTPUTS}, masks=masks)

    def write(self, buffers: StepBuffers, rows: int) -> None:
        """Lay the outcome into `buffers`."""
        for name, data in self.outputs.items():
            array: NDArray[Any] = getattr(buffers, name)[:rows]
            array[...] = np.frombuffer(data, array.dtype).reshape(array.shape)

    def sampled(self) -> NDArray[np.int32]:
        """The token of each row."""
        return np.frombuffer(self.outputs["sampled"], np.int32)


def _used(buffers: StepBuffers, name: str, sizes: tuple[int, int, int], blocks: int) -> NDArray[Any]:
    tokens, sequences, rows = sizes
    length = {"tokens": tokens, "bounds": sequences + 1, "sequences": sequences, "rows": rows}[INPUTS[name]]
    array: NDArray[Any] = getattr(buffers, name)[:length]
    return array[:, :blocks] if array.ndim == 2 else array


encode = msgspec.msgpack.encode
