"""The simulated server of `lmserve simulate --trace`: its sizes, and how long its steps take."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct


class StepModel(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long a step takes: a sum of parts, in milliseconds.

    `base_ms`: of every step. `decode_ms`: of each decoding sequence. `decode_context_ms`: of each token that those
    attend to. `prefill_ms`: of each prompt token. `prefill_context_ms`: of each pair of a prompt token and a token that
    it attends to. `prompt_end_ms`: of each prompt that ends in the step, whose first token is sampled.
    """

    base_ms: float
    decode_ms: float = 0.0
    decode_context_ms: float = 0.0
    prefill_ms: float = 0.0
    prefill_context_ms: float = 0.0
    prompt_end_ms: float = 0.0


class ServerSizes(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sizes of a server: those of `lmserve serve`, and its KV cache in blocks.

    `num_window_blocks`: those of layers that see only the last `window` tokens; 0: all layers have the same blocks.
    """

    max_batch: int = 64
    max_batch_tokens: int = 512
    max_model_len: int = 8192
    max_queue: int = 1024
    num_blocks: int = 8192
    block_size: int = 16
    prefix_cache: bool = True
    window: int = 0
    num_window_blocks: int = 0


class MeasuredStep(Struct, frozen=True, kw_only=True):
    """A step and what it took. `decode`: sequences; `prefill`: prompt tokens; both after `context` tokens."""

    decode: int
    prefill: int
    context: int
    measured_ms: float
    fitted_ms: float


class Fit(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `lmserve bench --fit` writes. `mean_error`: mean of |fitted / measured - 1| over the shapes."""

    model: str
    machine: str
    step_model: StepModel
    sizes: ServerSizes
    mean_error: float
    steps: list[MeasuredStep] = []


PARTS: Final = StepModel.__struct_fields__


def read_step_model(text: str) -> tuple[StepModel, ServerSizes]:
    """A step model, from a file of `lmserve bench --fit` or as `base_ms=4.1,decode_ms=1.2,...`, and its server's sizes.

    Raises ValueError that says what is wrong.
    """
    if "=" in text:
        try:
            parts = {name.strip(): float(value) for name, value in (part.split("=", 1) for part in text.split(","))}
            return msgspec.convert(parts, StepModel), ServerSizes()
        except ValueError as error:
            raise ValueError(f"NAME=MILLISECONDS of {', '.join(PARTS)} are needed, but {text!r} was given") from error
    try:
        fit = msgspec.json.decode(Path(text).read_bytes(), type=Fit)
    except (OSError, msgspec.DecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{text} is not a file of lmserve bench --fit: {reason}") from error
    return fit.step_model, fit.sizes
