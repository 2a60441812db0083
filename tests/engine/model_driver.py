"""Drives a Runner as the engine does, step by step, with blocks allocated in Python."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from lmserve.model.interface import LogitEdits


@dataclass(eq=False)
class Sequence:
    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


class Driver:
    """Blocks are handed out in a shuffled order, so that a table that happens to be 0, 1, 2 hides no fault."""

    def __init__(self, runner, seed: int = 0) -> None:
        self.runner = runner
        self.free = list(np.random.default_rng(seed).permutation(runner.info.num_blocks))

    def start(self, tokens, share: Sequence | None = None) -> Sequence:
        """A sequence that has computed nothing, or that shares the full blocks of another's common prefix."""
        sequence = Sequence([int(t) for t in tokens])
        if share is not None:
            size = self.runner.info.block_size
            common = 0
            for ours, theirs in zip(sequence.tokens[:-1], share.tokens[: share.computed], strict=False):
                if ours != theirs:
                    break
                common += 1
            sequence.blocks = share.blocks[: common // size]
            sequence.computed = common // size * size
        return sequence

    def preempt(self, sequence: Sequence) -> None:
        """Give up everything computed; the tokens stay and are computed again."""
        self.free[:0] = sequence.blocks
        sequence.blocks, sequence.computed = [], 0

    def fill(self, work: list[tuple[Sequence, int]]) -> tuple[int, int, int]:
        """Write a step over (sequence, new tokens) into the buffers; the last token of a caught-up one is sampled."""
        buffers, size = self.runner.buffers, self.runner.info.block_size
        token = row = 0
        buffers.block_tables[:] = -12345  # entries past the context are undefined: make any use of them fail
        for index, (sequence, new) in enumerate(work):
            first, last = sequence.computed, sequence.computed + new
            while len(sequence.blocks) * size < last:
                sequence.blocks.append(int(self.free.pop()))
            positions = np.arange(first, last)
            at = slice(token, token + new)
            buffers.token_ids[at] = sequence.tokens[first:last]
            buffers.positions[at] = positions
            buffers.slots[at] = np.array(sequence.blocks)[positions // size] * size + positions % size
            buffers.query_start[index : index + 2] = token, token + new
            buffers.context_lens[index] = last
            buffers.block_tables[index, : len(sequence.blocks)] = sequence.blocks
            token += new
            if last == len(sequence.tokens):
                buffers.sample_rows[row] = token - 1
                row += 1
        return token, len(work), row

    def step(self, work: list[tuple[Sequence, int]], edits: LogitEdits | None = None, *, logits: bool = False) -> None:
        """Run one step and append the sampled tokens; with `logits` the raw logits of sampled rows are kept too."""
        shape = self.fill(work)
        sampled = [sequence for sequence, new in work if sequence.computed + new == len(sequence.tokens)]
        native = hasattr(self.runner, "logits")
        with self.recorded(sampled) if logits and not native else nullcontext():
            self.runner.launch(*shape, edits)
        self.runner.collect()
        if logits and native:
            for sequence, row in zip(sampled, self.runner.logits(len(sampled)), strict=True):
                sequence.logits.append(row)
        for sequence, new in work:
            sequence.computed += new
        for sequence, token in zip(sampled, self.runner.buffers.sampled, strict=False):
            sequence.tokens.append(int(token))

    @contextmanager
    def recorded(self, sampled: list[Sequence]):
        """Keep the raw logits that each of the step's sampled sequences is sampled from."""
        ops = self.runner.ops
        original = ops.sample

        def sample(states, head, edits):
            for sequence, row in zip(sampled, ops.logits(states, head), strict=True):
                sequence.logits.append(row)
            original(states, head, edits)

        ops.sample = sample
        try:
            yield
        finally:
            ops.sample = original

    def generate(self, sequences: list[Sequence], new_tokens: int, *, chunk: int = 10**9, logits: bool = True) -> None:
        """Run until each sequence has new_tokens more than it began with, `chunk` prompt tokens a step at most."""
        goals = {id(sequence): len(sequence.tokens) + new_tokens for sequence in sequences}
        budget = self.runner.info.max_batch_tokens
        while running := [s for s in sequences if len(s.tokens) < goals[id(s)]]:
            work, left = [], budget
            for sequence in running:
                new = min(sequence.pending, chunk, left)
                if new:
                    work.append((sequence, new))
                    left -= new
            self.step(work, logits=logits)


def greedy(runner, n_rows: int | None = None) -> None:
    """Set every row (or the first n_rows) of the buffers to plain greedy sampling."""
    buffers = runner.buffers
    rows = slice(n_rows)
    buffers.temperature[rows] = 0
    buffers.top_k[rows] = 0
    buffers.top_p[rows] = 1
    buffers.min_p[rows] = 0
    buffers.repetition_penalty[rows] = 1
    buffers.presence_penalty[rows] = 0
    buffers.frequency_penalty[rows] = 0
    buffers.uniform[rows] = 0
    buffers.logprobs[rows] = -1
