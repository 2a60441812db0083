"""Runs the steps of a loaded model without an engine, for `step.py` and `accuracy.py`."""

from __future__ import annotations

import numpy as np
from lmserve.model import Checkpoint, RunnerOptions, load_runner
from lmserve.model.interface import LogitEdits, Runner
from numpy.typing import NDArray

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]


class Stepper:
    """A runner whose sequences have fixed blocks, one after another, and are all sampled greedily."""

    def __init__(self, checkpoint: Checkpoint, options: RunnerOptions) -> None:
        self.runner: Runner = load_runner(checkpoint, options)
        info, buffers = self.runner.info, self.runner.buffers
        self.block_size = info.block_size
        self.max_tokens = info.max_batch_tokens
        for name, value in (("temperature", 0), ("top_k", 0), ("top_p", 1), ("min_p", 0), ("logprobs", -1)):
            getattr(buffers, name)[:] = value
        buffers.repetition_penalty[:] = 1
        buffers.presence_penalty[:] = buffers.frequency_penalty[:] = buffers.uniform[:] = 0

    def fill(
        self, tokens: list[I32], computed: list[int], room: int, *, first: int = 0, rows: I32 | None = None
    ) -> tuple[int, int, int]:
        """Write a step: sequence `first` + s takes tokens[s], after the computed[s] that it has.

        room: tokens of cache of each sequence. rows: the sampled rows among the step's tokens; None: the last of each
        sequence.
        """
        buffers, size = self.runner.buffers, self.block_size
        blocks = -(-room // size)
        at = 0
        for s, (new, before) in enumerate(zip(tokens, computed, strict=True)):
            positions = np.arange(before, before + len(new), dtype=np.int32)
            step = slice(at, at + len(new))
            buffers.token_ids[step] = new
            own = np.arange((first + s) * blocks, (first + s + 1) * blocks)
            buffers.lay_sequence(s, step, positions, own, size)
            buffers.query_start[s : s + 2] = at, at + len(new)
            buffers.context_lens[s] = before + len(new)
            at += len(new)
        if rows is None:
            rows = buffers.query_start[1 : len(tokens) + 1] - 1
        buffers.sample_rows[: len(rows)] = rows
        return at, len(tokens), len(rows)

    def run(self, sizes: tuple[int, int, int], edits: LogitEdits | None = None) -> None:
        """Run the step that `fill` wrote."""
        self.runner.launch(*sizes, edits)
        self.runner.collect()

    def logits(self, sizes: tuple[int, int, int]) -> F32:
        """Run the step that `fill` wrote, and give the logits [rows, vocab] of its sampled rows."""
        if hasattr(self.runner, "logits"):
            self.run(sizes)
            values: F32 = self.runner.logits(sizes[2])
            return values
        import torch

        with torch.inference_mode():
            ops, model = self.runner.ops, self.runner.model  # type: ignore[attr-defined]
            ops.begin(*sizes)
            reference: F32 = ops.logits(model.forward(sampled_rows_only=True), model.head)
            return reference
