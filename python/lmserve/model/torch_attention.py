"""Paged attention in torch: the KV cache, its layout, and how a step reads it, one class for each way.

K and V are [layers, num_blocks + 1, block_size, kv_heads, head_dim]. The block past the last belongs to no sequence:
padding writes to it and reads from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmserve.model.config import CacheConfig, ModelConfig
from lmserve.model.interface import I32

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Decoding sequences share one padded call while the longest has at most this multiple of the shortest's blocks (plus
# 1).
PADDING = 1.5


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where a step's tokens are. Host arrays as in `StepBuffers`, cut to the step; the same on the device."""

    query_start: I32
    context_lens: I32
    block_tables: I32
    device_query_start: Tensor
    device_context_lens: Tensor
    device_block_tables: Tensor
    slots: Tensor


def allocate_cache(config: ModelConfig, cache: CacheConfig, device: torch.device) -> Tensor:
    """Zeros for K or for V: [layers, num_blocks + 1, block_size, kv_heads, head_dim]."""
    shape = (config.num_layers, cache.num_blocks + 1, cache.block_size, config.num_kv_heads, config.head_dim)
    dtype = DTYPES[cache.dtype]
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros take no memory before they are written, torch's do.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class Attention(Protocol):
    """Where keys and values go, and the attention that reads them."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the step's key and value [T, kv_heads, head_dim]."""

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """Attention of query [T, heads, head_dim]: [T, heads * head_dim]."""


class PagedAttention(Attention, Protocol):
    """Attention over a paged KV cache."""

    spare_block: int  # the block that belongs to no sequence

    def begin(self, layout: StepLayout) -> None:
        """Prepare what all layers of a step share."""


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences with one new token each, padded to the blocks of the longest."""

    tokens: Tensor  # [n] their rows among the step's tokens
    blocks: Tensor  # [n * blocks] block ids
    mask: Tensor  # [n, 1, 1, blocks * block_size] True: seen


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence with several new tokens."""

    start: int
    end: int
    context: int
    blocks: Tensor  # [blocks]
    mask: Tensor | None  # [new, context] True: seen; None: causal from the start


class SdpaAttention:
    """Gathers each sequence's blocks for torch's scaled_dot_product_attention: on every device and dtype."""

    def __init__(self, config: ModelConfig, cache: CacheConfig, device: torch.device) -> None:
        self.config = config
        self.block_size = cache.block_size
        self.keys, self.values = (allocate_cache(config, cache, device) for _ in range(2))
        self.spare_block = cache.num_blocks
        self.device = device
        self._slots = torch.empty(0, dtype=torch.int64)
        self._groups: list[_DecodeGroup] = []
        self._chunks: list[_Chunk] = []

    def begin(self, layout: StepLayout) -> None:
        self._slots = layout.slots
        new_tokens = np.diff(layout.query_start)
        self._chunks = [self._chunk(layout, int(s)) for s in np.flatnonzero(new_tokens > 1)]
        decoding = np.flatnonzero(new_tokens == 1)
        blocks = -(-layout.context_lens[decoding] // self.block_size)
        order = np.argsort(blocks, kind="stable")
        self._groups = []
        while len(order):
            size = int(np.searchsorted(blocks[order], int(blocks[order[0]]) * PADDING + 1, side="right"))
            # In the step's own order, so that a group of all its tokens needs no shuffling.
            members = np.sort(order[:size])
            self._groups.append(self._group(layout, decoding[members], int(blocks[members].max())))
            order = order[size:]

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        width = (-1, self.config.num_kv_heads, self.config.head_dim)
        self.keys[layer].view(width).index_copy_(0, self._slots, key)
        self.values[layer].view(width).index_copy_(0, self._slots, value)

    def attend(self, layer: int, query: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        out = torch.empty((len(query), heads, head_dim), dtype=query.dtype, device=query.device)
        for group in self._groups:
            n = len(group.tokens)
            whole = n == len(query)
            gathered = (n, -1, kv_heads, head_dim)
            members = query if whole else query[group.tokens]
            # The query heads of a key head are rows of one small matrix, so that each key is read once.
            attended = scaled_dot_product_attention(
                members.view(n, kv_heads, heads // kv_heads, head_dim),
                keys.index_select(0, group.blocks).view(gathered).transpose(1, 2),
                values.index_select(0, group.blocks).view(gathered).transpose(1, 2),
                attn_mask=group.mask,
            )
            attended = attended.reshape(n, heads, head_dim)
            if whole:
                return attended.view(n, -1)
            out[group.tokens] = attended
        for chunk in self._chunks:
            attended = scaled_dot_product_attention(
                query[chunk.start : chunk.end].transpose(0, 1)[None],
                keys.index_select(0, chunk.blocks).view(-1, kv_heads, head_dim)[: chunk.context].transpose(0, 1)[None],
                values.index_select(0, chunk.blocks)
                .view(-1, kv_heads, head_dim)[: chunk.context]
                .transpose(0, 1)[None],
                attn_mask=chunk.mask,
                is_causal=chunk.mask is None,
                enable_gqa=True,
            )
            out[chunk.start : chunk.end] = attended[0].transpose(0, 1)
        return out.view(len(query), -1)

    def _group(self, layout: StepLayout, sequences: NDArray[np.intp], width: int) -> _DecodeGroup:
        context = layout.context_lens[sequences]
        blocks = layout.block_tables[sequences, :width].astype(np.int64)
        # Entries past a sequence's context are undefined.
        blocks[np.arange(width)[None, :] * self.block_size >= context[:, None]] = self.spare_block
        seen = np.arange(width * self.block_size)[None, :] < context[:, None]
        return _DecodeGroup(
            tokens=self._upload(layout.query_start[sequences].astype(np.int64)),
            blocks=self._upload(blocks.reshape(-1)),
            mask=self._upload(seen)[:, None, None, :],
        )

    def _chunk(self, layout: StepLayout, sequence: int) -> _Chunk:
        start, end = (int(row) for row in layout.query_start[sequence : sequence + 2])
        context = int(layout.context_lens[sequence])
        blocks = layout.block_tables[sequence, : -(-context // self.block_size)].astype(np.int64)
        before = context - (end - start)
        mask = None if not before else np.arange(context)[None, :] <= np.arange(before, context)[:, None]
        return _Chunk(start, end, context, self._upload(blocks), None if mask is None else self._upload(mask))

    def _upload(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


class PassAttention:
    """Causal attention of whole sequences among their own tokens, without a cache."""

    def __init__(self, config: ModelConfig, cu_seqlens: I32) -> None:
        self.config = config
        self._bounds = [int(row) for row in cu_seqlens]
        self._key = self._value = torch.empty(0)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        del layer
        self._key, self._value = key, value

    def attend(self, layer: int, query: Tensor) -> Tensor:
        del layer
        out = torch.empty_like(query)
        for start, end in zip(self._bounds, self._bounds[1:], strict=False):
            attended = scaled_dot_product_attention(
                query[start:end].transpose(0, 1)[None],
                self._key[start:end].transpose(0, 1)[None],
                self._value[start:end].transpose(0, 1)[None],
                is_causal=True,
                enable_gqa=True,
            )
            out[start:end] = attended[0].transpose(0, 1)
        return out.reshape(len(query), -1)
