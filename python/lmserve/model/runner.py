"""Runs the steps that the engine plans: the part that all runners share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmserve.model.checkpoint import Checkpoint
from lmserve.model.config import CacheConfig, EncoderConfig
from lmserve.model.embedding import MEAN, Embedding, EmbeddingHead
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
    windowed = bool(plan.num_window_blocks)

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
        state_tokens=i32(states),
        copied_blocks=i32(states),
        adapters=i32(sequences),
        window_slots=i32(tokens * windowed),
        window_tables=i32(sequences * windowed, blocks),
        next_tokens=i32(sequences * plan.mtp),
        drafts=i32(rows * plan.mtp),
    )


def cache_config(plan: MemoryPlan, dtype: str) -> CacheConfig:
    """The KV cache of a plan, of that type."""
    return CacheConfig(
        plan.block_size, plan.num_blocks, plan.max_model_len, dtype, plan.state_slots, plan.num_window_blocks
    )


def runner_info(checkpoint: Checkpoint, plan: MemoryPlan, weight_bytes: int) -> RunnerInfo:
    """What the engine needs to know about a loaded checkpoint."""
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
        can_embed=checkpoint.embedding.pooling is not None,
        state_slots=plan.state_slots,
        state_bytes=plan.state_bytes,
        kv_memory=plan.kv_memory,
        window=plan.window,
        num_window_blocks=plan.num_window_blocks,
        embedding_size=checkpoint.embedding.length,
    )


class DecoderRunner(Generic[A, W]):
    """A `Runner` of a model over any `Ops`."""

    def __init__(
        self,
        info: RunnerInfo,
        buffers: StepBuffers,
        model: Decoder[A, W],
        ops: Ops[A, W],
        embedding: Embedding = MEAN,
    ) -> None:
        self.info = info
        self.buffers = buffers
        self.model = model
        self.ops = ops
        self._embedding = embedding
        self._finish = EmbeddingHead(embedding)

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        """Start one step over the buffers; see `Runner`."""
        if not self.info.can_generate:
            raise RuntimeError(f"{self.info.name} is an embedding model and cannot generate")
        self.ops.begin(n_tokens, n_seqs, n_rows)
        states = self.model.forward(sampled_rows_only=True)
        if n_rows:
            self.ops.sample(states, self.model.head, edits)

    def collect(self) -> None:
        """Wait for the launched step's outputs; see `Runner`."""
        self.ops.finish()

    def embed(self, token_ids: I32, cu_seqlens: I32) -> F32:
        """[n, embedding_size]; see `Runner`.

        A pass has at most max_batch_tokens tokens, or one longer sequence. Of an encoder its sequences are padded to
        the longest, and so like lengths are computed together.
        """
        sequences = np.split(token_ids, cu_seqlens[1:-1])
        pooled = np.empty((len(sequences), self.info.hidden_size), np.float32)
        for members in self._passes(np.diff(cu_seqlens)):
            pooled[members] = self._embed_pass([sequences[member] for member in members])
        return self._finish(pooled)

    def _passes(self, lengths: I32) -> Iterator[list[int]]:
        padded = isinstance(self.ops.config, EncoderConfig)
        members: list[int] = []
        tokens = 0
        for index in np.argsort(lengths, kind="stable") if padded else range(len(lengths)):
            length = int(lengths[index])
            tokens = (len(members) + 1) * length if padded else tokens + length
            if members and tokens > self.info.max_batch_tokens:
                yield members
                members, tokens = [], length
            members.append(int(index))
        yield members

    def _embed_pass(self, sequences: list[I32]) -> F32:
        cu_seqlens = np.cumsum([0, *map(len, sequences)], dtype=np.int32)
        places = np.concatenate([self._embedding.places(tokens) for tokens in sequences])
        self.ops.begin_embed(np.concatenate(sequences), cu_seqlens, places)
        return self.ops.pool(self.model.forward(sampled_rows_only=False), self._embedding.pooling or "mean")
