"""Measures how long steps of a model take on this machine, and fits a `StepModel` to the times."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from time import perf_counter
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from lmserve.capacity.setup import PARTS, Fit, MeasuredStep, ServerSizes, StepModel
from lmserve.config import ServeConfig
from lmserve.engine.load import ModelPlan
from lmserve.model import load_runner
from lmserve.model.interface import Runner, RunnerInfo

REPEATS: Final = 5
MAX_WARM_UPS: Final = 3
BUDGET_SECONDS: Final = 1.5  # of one shape: slow ones are repeated less
DECODING: Final = (1, 2, 4, 8, 16, 32, 64)
DECODE_CONTEXTS: Final = (64, 512, 2048)
PROMPTS: Final = (16, 64, 128, 256, 512)
PROMPT_CONTEXTS: Final = (0, 1024, 3072)


@dataclass(frozen=True, slots=True)
class Shape:
    """A step: `decode` sequences that decode after `context` tokens, and `prefill` tokens of a prompt, which ends."""

    decode: int
    prefill: int
    context: int

    def features(self) -> list[float]:
        """What each part of a `StepModel` is multiplied by; see `StepModel::seconds` in src/sim/capacity/setup.rs."""
        pairs = self.prefill * self.context + self.prefill * (self.prefill + 1) // 2
        return [1, self.decode, self.decode * (self.context + 1), self.prefill, pairs, float(self.prefill > 0)]


def shapes(sizes: ServerSizes) -> list[Shape]:
    """What is measured on a server of these sizes."""
    capacity = sizes.num_blocks * sizes.block_size
    alone = [Shape(n, 0, context) for n, context in product(DECODING, DECODE_CONTEXTS)]
    prompts = [Shape(0, n, context) for n, context in product(PROMPTS, PROMPT_CONTEXTS)]
    mixed = [Shape(decode, prefill, 256) for decode, prefill in ((4, 64), (16, 128), (32, 256))]

    def fits(shape: Shape) -> bool:
        longest = shape.context + max(shape.prefill, 1)
        blocks = -(-longest // sizes.block_size) * (shape.decode + 1)
        return (
            shape.decode + (shape.prefill > 0) <= sizes.max_batch
            and shape.decode + shape.prefill <= sizes.max_batch_tokens
            and longest <= sizes.max_model_len
            and blocks * sizes.block_size <= capacity
        )

    return [shape for shape in (*alone, *prompts, *mixed) if fits(shape)]


def measure_fit(plan: ModelPlan, config: ServeConfig, progress: Callable[[int, int], None]) -> Fit:
    """Load the model and time its steps. `progress` is called with the shapes done and all of them."""
    runner = load_runner(plan.checkpoint, plan.options)
    info = runner.info
    sizes = ServerSizes(
        max_batch=info.max_batch,
        max_batch_tokens=info.max_batch_tokens,
        max_model_len=info.max_model_len,
        max_queue=config.max_queue,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        prefix_cache=config.prefix_cache,
        window=info.window,
        num_window_blocks=info.num_window_blocks,
    )
    chosen = [shape for shape in shapes(sizes) if _fits_windows(shape, info)]
    times = []
    for at, shape in enumerate(chosen):
        times.append(time_step(runner, shape))
        progress(at + 1, len(chosen))
    model, error = fit([shape.features() for shape in chosen], times)
    parts = np.array(list(msgspec.structs.astuple(model)))
    steps = [
        MeasuredStep(
            decode=shape.decode,
            prefill=shape.prefill,
            context=shape.context,
            measured_ms=milliseconds,
            fitted_ms=float(np.dot(shape.features(), parts)),
        )
        for shape, milliseconds in zip(chosen, times, strict=True)
    ]
    machine = f"{platform.machine()}, {info.device}, {info.dtype}"
    return Fit(model=info.name, machine=machine, step_model=model, sizes=sizes, mean_error=error, steps=steps)


def time_step(runner: Runner, shape: Shape) -> float:
    """Milliseconds of a step, the median of several once it gets no faster."""
    rows = fill(runner, shape)

    def once() -> float:
        started = perf_counter()
        runner.launch(shape.decode + shape.prefill, shape.decode + (shape.prefill > 0), rows, None)
        runner.collect()
        return perf_counter() - started

    # The first ones find memory that was never touched.
    before, time = once(), once()
    for _ in range(MAX_WARM_UPS):
        if time > 0.8 * before:
            break
        before, time = time, once()
    times = [time]
    while len(times) < REPEATS and sum(times) < BUDGET_SECONDS:
        times.append(once())
    return 1e3 * statistics.median(times)


def fill(runner: Runner, shape: Shape) -> int:
    """Write a step of that shape into the runner's buffers; its sampled rows. The KV cache holds anything."""
    buffers, info = runner.buffers, runner.info
    source = np.random.default_rng(0)
    lengths = [1] * shape.decode + [shape.prefill] * (shape.prefill > 0)
    token = block = window_block = 0
    for at, new in enumerate(lengths):
        positions = np.arange(shape.context, shape.context + new)
        blocks = block + np.arange(-(-(shape.context + new) // info.block_size))
        block = int(blocks[-1]) + 1
        span = slice(token, token + new)
        buffers.token_ids[span] = source.integers(0, info.vocab_size, new)
        window_blocks = window_block + np.arange(_window_blocks(shape.context, new, info))
        window_block = int(window_blocks[-1]) + 1
        buffers.lay_sequence(at, span, positions, blocks, info.block_size, window_blocks)
        buffers.context_lens[at] = shape.context + new
        token += new
        buffers.query_start[at + 1] = token
        buffers.sample_rows[at] = token - 1
    buffers.query_start[0] = 0
    rows = slice(0, len(lengths))
    for name, value in (("temperature", 0.0), ("top_p", 1.0), ("repetition_penalty", 1.0)):
        getattr(buffers, name)[rows] = value
    buffers.logprobs[rows] = -1
    return len(lengths)


def _window_blocks(context: int, new: int, info: RunnerInfo) -> int:
    """Blocks of layers with a window that a step of `new` tokens behind `context` others needs."""
    passed = max(0, context + 1 - info.window) // info.block_size
    return -(-(context + new) // info.block_size) - passed


def _fits_windows(shape: Shape, info: RunnerInfo) -> bool:
    needed = shape.decode * _window_blocks(shape.context, 1, info)
    needed += _window_blocks(shape.context, shape.prefill, info) if shape.prefill else 0
    return needed <= info.num_window_blocks or not info.num_window_blocks


def fit(features: Sequence[Sequence[float]], milliseconds: Sequence[float]) -> tuple[StepModel, float]:
    """The step model of least squared relative error without a negative part, and its mean relative error."""
    times = np.asarray(milliseconds, np.float64)
    rows = np.asarray(features, np.float64) / times[:, None]
    parts = _non_negative(rows, np.ones(len(times)))
    # A step takes a time: the simulator's clock must go on.
    parts[0] = max(parts[0], 1e-3)
    error = float(np.abs(rows @ parts - 1).mean())
    return StepModel(**dict(zip(PARTS, parts.tolist(), strict=True))), error


def _non_negative(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares; a column whose coefficient would be negative is left out, the most negative first."""
    scale = np.abs(rows).max(axis=0)
    kept = [at for at in range(rows.shape[1]) if scale[at] > 0]
    while kept:
        found = np.linalg.lstsq(rows[:, kept] / scale[kept], values, rcond=None)[0]
        if found.min() >= 0:
            parts = np.zeros(rows.shape[1])
            parts[kept] = found / scale[kept]
            return parts
        del kept[int(found.argmin())]
    return np.zeros(rows.shape[1])
