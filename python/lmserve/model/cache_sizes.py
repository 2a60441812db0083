"""How the memory of a KV cache is shared by the layers that see everything and those with a window."""

from __future__ import annotations

from dataclasses import dataclass

# Blocks of layers with a window at most, in multiples of what a full batch holds: the rest keeps ends of conversations.
SPARE_WINDOWS = 4
# The share of the memory that they take at most, unless a full batch of short sequences needs more.
WINDOW_SHARE = 0.5
# Blocks at most where no layer sees everything: they take no memory, but are counted one by one.
MOST_BLOCKS = 1 << 20


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Memory in bytes, lengths in tokens. `window` is 0 where all layers have the same blocks."""

    memory: int
    block_size: int
    longest: int
    per_token: int
    window_per_token: int
    window: int

    def blocks(self, max_batch: int, max_batch_tokens: int) -> tuple[int, int]:
        """Blocks, and blocks of layers with a window; too few for one sequence where the memory does not hold it."""
        if not self.window:
            return self.memory // (self.per_token * self.block_size), 0
        own = -(-self.window // self.block_size) + 1
        # Between its two ends, a step has the window of each sequence and what it computes.
        one = own + -(-max_batch_tokens // self.block_size) + 1
        batch = max_batch * (own + 1) + -(-max_batch_tokens // self.block_size)
        each = self.window_per_token * self.block_size
        wanted = max(one, min(int(self.memory * WINDOW_SHARE) // each, SPARE_WINDOWS * batch))
        blocks, windows = self._rest(wanted)
        if blocks * self.block_size < self.longest:
            blocks, windows = self._rest(min(wanted, one))
        return blocks, windows

    def _rest(self, windows: int) -> tuple[int, int]:
        """Blocks of the memory that so many blocks of layers with a window leave."""
        both = self.memory // ((self.per_token + self.window_per_token) * self.block_size)
        if windows >= both:
            # A block has at most one of them.
            return both, both
        left = self.memory - windows * self.window_per_token * self.block_size
        if not self.per_token:
            return min(MOST_BLOCKS, SPARE_WINDOWS * windows + self.longest // self.block_size + 1), windows
        return left // (self.per_token * self.block_size), windows
