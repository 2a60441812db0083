"""Runs the steps that the engine plans: what every runner shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmserve.model.checkpoint import Checkpoint
from lmserve.model.config import CacheConfig
from lmserve.model.families.family import Decoder
from lmserve.model.interface import F32, I32, MAX_LOGPROBS, LogitEdits, RunnerInfo, StepBuffers
from lmserve.model.ops import Ops
from lmserve.model.options import MemoryPlan

A = TypeVar("A")
W = TypeVar("W")

Allocate = Callable[[tuple[int, ...], Any], NDArray[Any]]


def allocate_buffers(plan: MemoryPlan, allocate: Allocate = np.zeros) -> StepBuffers:
    """The arrays of a step for this plan; `allocate(shape, dtype)` gives zeroed memory, pinned where that pays."""
    tokens, sequences, rows = plan.max_batch_tokens, plan.max_batch, plan.max_rows
    blocks = -(-plan.max_model_len // plan.block_size)
    states = sequences if plan.state_slots else 0

    def i32(*shape: int) -> I32:
        return allocate(shape, np.int32)

    def f32(*shape: int) -> F32:
        return allocate(shape, np.float32)

    return StepBuffers(
        token_ids=i32(tokens),
        positions=i32(tokens),
        slots=i32(tokens),
        query_start=i32(sequences + 1),
        context_lens=i32(sequences),
        block_tables=i32(sequences, blocks),
        sample_rows=i32(rows),
        temperature=f32(rows),
        top_k=i32(rows),
        top_p=f32(rows),
        min_p=f32(rows),
        repetition_penalty=f32(rows),
        presence_penalty=f32(rows),
        frequency_penalty=f32(rows),
        uniform=f32(rows),
        logprobs=i32(rows),
        sampled=i32(rows),
        sampled_logprob=f32(rows),
        top_ids=i32(rows, MAX_LOGPROBS),
        top_logprobs=f32(rows, MAX_LOGPROBS),
        state_from=i32(states),
        state_to=i32(states),
        copied_blocks=i32(states),
    )


def cache_config(plan: MemoryPlan) -> CacheConfig:
    """The KV cache of a plan."""
    return CacheConfig(plan.block_size, plan.num_blocks, plan.max_model_len, plan.dtype, plan.state_slots)


def runner_info(checkpoint: Checkpoint, plan: MemoryPlan, weight_bytes: int) -> RunnerInfo:
    """What the engine is told of a loaded checkpoint."""
    return RunnerInfo(
        name=checkpoint.name,
        device=plan.device,
        dtype=plan.dtype,
        vocab_size=checkpoint.config.vocab_size,
        hidden_size=checkpoint.config.hidden_size,
        max_model_len=plan.max_model_len,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        kv_bytes_per_token=plan.kv_bytes_per_token,
        weight_bytes=weight_bytes,
        max_batch=plan.max_batch,
        max_batch_tokens=plan.max_batch_tokens,
        can_generate=checkpoint.kind == "generate",
        can_embed=True,
        state_slots=plan.state_slots,
        state_bytes=plan.state_bytes,
    )


class DecoderRunner(Generic[A, W]):
    """A `Runner` of a decoder over any `Ops`."""

    def __init__(self, info: RunnerInfo, buffers: StepBuffers, model: Decoder[A, W], ops: Ops[A, W]) -> None:
        self.info = info
        self.buffers = buffers
        self.model = model
        self.ops = ops

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        """Start one step over the buffers; see `Runner`."""
        self.ops.begin(n_tokens, n_seqs, n_rows)
        states = self.model.forward(sampled_rows_only=True)
        if n_rows:
            self.ops.sample(states, self.model.head, edits)

    def collect(self) -> None:
        """Wait for the launched step's outputs; see `Runner`."""
        self.ops.finish()

    def embed(self, token_ids: I32, cu_seqlens: I32) -> F32:
        """[n, hidden] mean-pooled, L2-normalised final states; see `Runner`.

        A pass has at most max_batch_tokens tokens, or one longer sequence.
        """
        n = len(cu_seqlens) - 1
        embeddings = np.empty((n, self.info.hidden_size), np.float32)
        first = 0
        while first < n:
            limit = cu_seqlens[first] + self.info.max_batch_tokens
            last = max(first + 1, int(np.searchsorted(cu_seqlens, limit, side="right")) - 1)
            bounds = cu_seqlens[first : last + 1]
            embeddings[first:last] = self._embed_pass(token_ids[bounds[0] : bounds[-1]], bounds - bounds[0])
            first = last
        return embeddings

    def _embed_pass(self, token_ids: I32, cu_seqlens: I32) -> F32:
        self.ops.begin_embed(token_ids, cu_seqlens)
        return self.ops.pool(self.model.forward(sampled_rows_only=False))
