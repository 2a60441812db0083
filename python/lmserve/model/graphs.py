"""Decode steps captured once and replayed, one for each power of two of sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


def buckets(max_batch: int) -> list[int]:
    """Batch sizes to capture, ascending: the powers of two below max_batch, and max_batch."""
    sizes = []
    size = 1
    while size < max_batch:
        sizes.append(size)
        size *= 2
    return [*sizes, max_batch]


class DecodeGraphs(Generic[T]):
    """`capture(size)` records a decode step of `size` sequences and gives what replays it and returns its outputs."""

    def __init__(self, max_batch: int, capture: Callable[[int], Callable[[], T]]) -> None:
        # The largest first: the smaller ones then fit in the memory that it has reserved.
        self._replays = {size: capture(size) for size in reversed(buckets(max_batch))}
        self._sizes = sorted(self._replays)

    def size_for(self, n_seqs: int) -> int:
        """The smallest captured size that holds n_seqs sequences."""
        for size in self._sizes:
            if size >= n_seqs:
                return size
        raise ValueError(f"{n_seqs} sequences; the largest captured step has {self._sizes[-1]}")

    def replay(self, size: int) -> T:
        """Run the step captured for `size` sequences."""
        return self._replays[size]()
