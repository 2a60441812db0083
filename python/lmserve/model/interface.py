"""The interface between the engine (Rust) and a model loop (Python): who allocates what, and what one step is.

The engine thread writes a step's flat arrays into `StepBuffers` (allocated once by the runner, pinned if that helps),
calls `launch`, then `collect`, and reads `sampled` (and the logprob arrays). Neither side allocates anything per step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lmserve.model.adapter_files import Adapter

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
Integers = NDArray[np.integer[Any]]

MAX_LOGPROBS = 20
NO_TOKEN = -1  # in `sampled`: the row's logits are not finite


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What the engine must know of a loaded model. Lengths in tokens."""

    name: str
    device: str
    dtype: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    weight_bytes: int
    max_batch: int
    max_batch_tokens: int
    can_generate: bool
    can_embed: bool
    state_slots: int = 0  # recurrent states that there is room for; 0: the model has none
    state_bytes: int = 0  # of one of them
    window: int = 0  # tokens that the layers of the second group of blocks see; 0: there is no such group
    num_window_blocks: int = 0  # blocks for these layers
    embedding_size: int = 0  # numbers that a text becomes; 0: hidden_size

    kv_memory: int = 0  # bytes that the KV cache was planned for

    @property
    def sizes(self) -> dict[str, int]:
        """The `RunnerOptions` that give another runner the same sizes."""
        states = {"state_slots": self.state_slots} if self.state_slots else {}
        return states | {
            "max_batch": self.max_batch,
            "max_batch_tokens": self.max_batch_tokens,
            "max_model_len": self.max_model_len,
            "block_size": self.block_size,
            "kv_memory": self.kv_memory,
        }

    def __post_init__(self) -> None:
        if not self.embedding_size:
            object.__setattr__(self, "embedding_size", self.hidden_size)


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """The flat arrays of one step.

    T = max_batch_tokens, S = max_batch, B = blocks per sequence (ceil(max_model_len / block_size)), R = sampled rows
    (>= S).
    A step uses the first n_tokens / n_seqs / n_rows entries. Sequences lie one after another in the token arrays.
    """

    token_ids: I32  # [T]
    positions: I32  # [T] absolute position of each token in its sequence
    slots: I32  # [T] block_id * block_size + offset: where each token's K and V go
    query_start: I32  # [S + 1] sequence s owns tokens query_start[s] .. query_start[s + 1]
    context_lens: I32  # [S] tokens in the cache after this step, this step's included
    block_tables: I32  # [S, B] block ids; entries past the context are undefined
    sample_rows: I32  # [R] index in the token arrays whose logits row r is sampled
    temperature: F32  # [R] 0: greedy
    top_k: I32  # [R] 0: all
    top_p: F32  # [R]
    min_p: F32  # [R]
    repetition_penalty: F32  # [R] 1: off
    presence_penalty: F32  # [R] 0: off
    frequency_penalty: F32  # [R] 0: off
    uniform: F32  # [R] in [0, 1), drawn by the engine from (seed, position): the only randomness there is
    logprobs: I32  # [R] -1: none, 0: the sampled token's, k: the k most likely too
    sampled: I32  # [R] out: token ids, or NO_TOKEN
    sampled_logprob: F32  # [R] out, rows with logprobs >= 0: log-softmax of the raw logits
    top_ids: I32  # [R, MAX_LOGPROBS] out, rows with logprobs > 0, most likely first
    top_logprobs: F32  # [R, MAX_LOGPROBS] out
    # Of models with recurrent layers, else empty: [S] the slot with the sequence's state before this step (-1: it
    # begins), and the slot for its state after it, which may be the same; how many of its tokens of this step that
    # state goes beyond, the rest being guesses; and a block (-1: none) whose tokens up to the sequence's first one of
    # this step are first copied to the sequence's own block.
    state_from: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    state_to: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    state_tokens: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    copied_blocks: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    # [S] the number of the sequence's adapter, 0: none; empty where the model takes none.
    adapters: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    # Of models with layers that have a window and blocks of their own for these, else empty: [T] and [S, B], as `slots`
    # and `block_tables`, in the blocks of these layers. Where a sequence has given a block back, its entry is that of
    # the first one that it still has.
    window_slots: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    window_tables: I32 = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    # Of models with a head that guesses a token ahead, else empty: [S] the token after the sequence's last one of this
    # step (-1: it is sampled here, or not known), and [R] out: the token that may follow the row's.
    next_tokens: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    drafts: I32 = field(default_factory=lambda: np.zeros(0, np.int32))

    def lay_sequence(
        self,
        sequence: int,
        tokens: slice,
        positions: Integers,
        blocks: Integers,
        block_size: int,
        window_blocks: Integers | None = None,
    ) -> None:
        """Write where a sequence's tokens of a step go, and its blocks.

        window_blocks: those in layers with a window that it has not given back, for its last blocks; None: the same as
        `blocks`.
        """
        at, offset = positions // block_size, positions % block_size
        self.positions[tokens] = positions
        self.slots[tokens] = blocks[at] * block_size + offset
        self.block_tables[sequence, : len(blocks)] = blocks
        if not len(self.window_slots):
            return
        own = blocks if window_blocks is None else window_blocks
        own = np.concatenate((np.repeat(own[:1], len(blocks) - len(own)), own))
        self.window_slots[tokens] = own[at] * block_size + offset
        self.window_tables[sequence, : len(own)] = own


class Masks(Protocol):
    """The masks of a step's guided rows, computed while the model runs (`lmserve._core.StepMasks`)."""

    @property
    def rows(self) -> list[int]:
        """The sampled rows that have masks, ascending."""

    def wait(self) -> bytearray:
        """Wait, without the GIL, until the masks are there; row after row, each a bit for each token.

        The least significant bit of a row's first 32-bit native word is token 0; a set bit allows its token.
        """


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Ragged data of rows that few requests need; row r owns entries start[r] .. start[r + 1].

    Order of application: repetition penalty, frequency and presence penalty, bias, masks, then temperature, top_k,
    top_p, min_p (each on what is left).
    """

    bias_start: I32  # [n_rows + 1]
    bias_token: I32
    bias_value: F32  # added to the logit; -inf forbids the token
    seen_start: I32  # [n_rows + 1] distinct tokens of prompt and output, of rows with a penalty
    seen_token: I32
    seen_count: I32  # occurrences in the output alone (0: in the prompt only)
    masks: Masks | None = None  # of rows of which only some tokens are allowed

    @classmethod
    def from_bytes(
        cls,
        bias_start: bytearray,
        bias_token: bytearray,
        bias_value: bytearray,
        seen_start: bytearray,
        seen_token: bytearray,
        seen_count: bytearray,
        masks: Masks | None,
    ) -> Self:
        """Build from native-endian arrays (called by `lmserve._core`)."""
        return cls(
            np.frombuffer(bias_start, np.int32),
            np.frombuffer(bias_token, np.int32),
            np.frombuffer(bias_value, np.float32),
            np.frombuffer(seen_start, np.int32),
            np.frombuffer(seen_token, np.int32),
            np.frombuffer(seen_count, np.int32),
            masks,
        )


@runtime_checkable
class TakesAdapters(Protocol):
    """A `Runner` whose sequences may have adapters. These methods may be called on any thread."""

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """Take an adapter in, under a number above 0 that is free. Raises AdapterError where it does not fit."""

    def unload_adapter(self, number: int) -> None:
        """Forget an adapter, which no sequence of a step has any more."""


def taking_adapters(runner: Runner) -> TakesAdapters:
    """The runner as one that takes adapters. Raises TypeError if it takes none."""
    if not isinstance(runner, TakesAdapters):
        raise TypeError(f"{runner.info.name} takes no adapters")
    return runner


class Runner(Protocol):
    """A loaded model with its KV cache. Called from the engine thread alone, with the GIL."""

    info: RunnerInfo
    buffers: StepBuffers

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        """Start one step over the buffers.

        May return before the device is done: the inputs must not change until `collect`.
        """

    def collect(self) -> None:
        """Wait until the outputs of the launched step are in the buffers."""

    def embed(self, token_ids: I32, cu_seqlens: I32) -> F32:
        """[n, embedding_size] what the model says of n token sequences: embeddings of length 1 (L2), or scores.

        Touches no KV block. cu_seqlens: [n + 1].
        """
