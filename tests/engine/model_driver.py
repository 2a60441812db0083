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
    # Of a model with recurrent layers: the slots with its state, by the tokens computed; and those that stay.
    states: dict[int, int] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    # Of a model with blocks of their own for layers with a window: those for each of `blocks`; -1: given back.
    window_blocks: list[int] = field(default_factory=list)
    shared: int = 0  # so many of them others have, too: nobody is given them
    # The block that the tokens behind its full blocks are to be copied from in its next step.
    copied_block: int = -1
    adapter: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


class Driver:
    """Blocks are handed out in a shuffled order, so that a table that happens to be 0, 1, 2 hides no fault.

    Of layers with a window, what is out of it is given back after each step, and taken by whoever comes next: at once
    where the driver is `eager`, else when there are no others.

    States are written to a slot of their own in every other step, and in place in the others.
    """

    def __init__(self, runner, seed: int = 0, *, eager: bool = False) -> None:
        self.runner = runner
        self.eager = eager
        generator = np.random.default_rng(seed)
        self.free = list(generator.permutation(runner.info.num_blocks))
        self.free_windows = list(generator.permutation(runner.info.num_window_blocks))
        # Those out of a window, which keep what they have until they are needed.
        self.passed: list[tuple[Sequence, int]] = []
        self.free_states = list(generator.permutation(runner.info.state_slots))

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
            known = common // size * size
            if self.runner.info.state_slots:
                known = max((at for at in share.states if at <= common), default=0)
                sequence.states = {at: slot for at, slot in share.states.items() if at == known}
                # The slot is the other's.
                sequence.kept = set(sequence.states)
                sequence.copied_block = share.blocks[known // size] if known % size else -1
            if self.runner.info.window:
                while known and -1 in share.window_blocks[self.first_seen(known) : known // size]:
                    known -= size
                sequence.window_blocks = share.window_blocks[: known // size]
                sequence.shared = known // size
                share.shared = max(share.shared, sequence.shared)
                self.passed = [(other, at) for other, at in self.passed if at >= other.shared]
            sequence.blocks = share.blocks[: known // size]
            sequence.computed = known
        return sequence

    def first_seen(self, computed: int) -> int:
        """The first block that a window shows behind `computed` tokens."""
        size = self.runner.info.block_size
        return max(0, computed // size * size + 1 - self.runner.info.window) // size

    def window_block(self) -> int:
        if self.passed and (self.eager or not self.free_windows):
            sequence, at = self.passed.pop(0)
            self.free_windows.append(sequence.window_blocks[at])
            sequence.window_blocks[at] = -1
        return int(self.free_windows.pop())

    def preempt(self, sequence: Sequence) -> None:
        """Give up everything computed; the tokens stay and are computed again."""
        self.free[:0] = sequence.blocks
        sequence.blocks, sequence.computed = [], 0
        self.passed = [(other, at) for other, at in self.passed if other is not sequence]
        self.free_windows[:0] = [block for block in sequence.window_blocks[sequence.shared :] if block != -1]
        sequence.window_blocks, sequence.shared = [], 0
        self.free_states += [slot for at, slot in sequence.states.items() if at not in sequence.kept]
        sequence.states = {}

    def rewind(self, sequence: Sequence, computed: int) -> None:
        """Take tokens behind the first `computed` back, whose slots are written again."""
        first = self.first_seen(computed) if self.runner.info.window else 0
        assert -1 not in sequence.window_blocks[first:]
        self.passed = [(other, at) for other, at in self.passed if other is not sequence or at < first]
        sequence.computed = computed

    def fill(self, work: list[tuple[Sequence, int]]) -> tuple[int, int, int]:
        """Write a step over (sequence, new tokens) into the buffers; the last token of a caught-up one is sampled."""
        buffers, size = self.runner.buffers, self.runner.info.block_size
        token = row = 0
        # Entries past the context are undefined: make any use of them fail.
        buffers.block_tables[:] = buffers.window_tables[:] = -12345
        for index, (sequence, new) in enumerate(work):
            first, last = sequence.computed, sequence.computed + new
            while len(sequence.blocks) * size < last:
                sequence.blocks.append(int(self.free.pop()))
                if self.runner.info.window:
                    sequence.window_blocks.append(self.window_block())
            positions = np.arange(first, last)
            at = slice(token, token + new)
            buffers.token_ids[at] = sequence.tokens[first:last]
            windows = None
            if self.runner.info.window:
                windows = np.array(sequence.window_blocks[self.first_seen(first) :])
                assert -1 not in windows
            buffers.lay_sequence(index, at, positions, np.array(sequence.blocks), size, windows)
            buffers.query_start[index : index + 2] = token, token + new
            buffers.context_lens[index] = last
            if len(buffers.next_tokens):
                buffers.next_tokens[index] = sequence.tokens[last] if last < len(sequence.tokens) else -1
            buffers.adapters[index] = sequence.adapter
            if self.runner.info.state_slots:
                buffers.state_from[index], buffers.state_to[index] = self.move_state(sequence, first, last)
                buffers.state_tokens[index] = new
                buffers.copied_blocks[index], sequence.copied_block = sequence.copied_block, -1
            token += new
            if last == len(sequence.tokens):
                buffers.sample_rows[row] = token - 1
                row += 1
        return token, len(work), row

    def move_state(self, sequence: Sequence, first: int, last: int) -> tuple[int, int]:
        """The slots that the state after `first` tokens is in and the one after `last` goes to."""
        begin = sequence.states[first] if first else -1
        in_place = first and first not in sequence.kept and last % 2
        end = begin if in_place else self.free_states.pop()
        if first and first not in sequence.kept:
            del sequence.states[first]
            if not in_place:
                self.free_states.insert(0, begin)
        sequence.states[last] = end
        return begin, int(end)

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
            if self.runner.info.window:
                passed = range(self.first_seen(sequence.computed), self.first_seen(sequence.computed + new))
                self.passed += [(sequence, at) for at in passed if at >= sequence.shared]
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

    def generate(
        self,
        sequences: list[Sequence],
        new_tokens: int,
        *,
        chunk: int = 10**9,
        stop: int | None = None,
        logits: bool = True,
    ) -> None:
        """Run until each sequence has new_tokens more than it began with, `chunk` prompt tokens a step at most.

        A step ends at position `stop`, whose state is kept, as is the one that each sequence begins with.
        """
        for sequence in sequences:
            sequence.kept |= {sequence.computed} | ({stop} if stop is not None else set())
        goals = {id(sequence): len(sequence.tokens) + new_tokens for sequence in sequences}
        budget = self.runner.info.max_batch_tokens
        while running := [s for s in sequences if len(s.tokens) < goals[id(s)]]:
            work, left = [], budget
            for sequence in running:
                new = min(sequence.pending, chunk, left)
                if stop is not None and sequence.computed < stop:
                    new = min(new, stop - sequence.computed)
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


def assert_alone_as_in_a_batch(runner) -> None:
    """Prompts have the same logits to the bit in one batch, and alone, whole and in pieces."""
    greedy(runner)
    generator = np.random.default_rng(4)
    prompts = [generator.integers(0, 199, length) for length in (1, 17, 64, 33)]
    together = Driver(runner)
    sequences = [together.start(prompt) for prompt in prompts]
    together.generate(sequences, 8)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        for chunk in (7, 10**9):
            driver = Driver(runner, seed=9)
            alone = driver.start(prompt)
            driver.generate([alone], 8, chunk=chunk)
            assert np.array_equal(np.array(alone.logits), np.array(sequence.logits))
