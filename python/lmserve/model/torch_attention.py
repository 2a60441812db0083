"""Paged attention in torch: the KV cache, its layout, and how a step reads it, one class for each way.

K and V of a layer are [num_blocks + 1, block_size, kv_heads, head_dim]. The block past the last belongs to no sequence:
padding writes to it and reads from it. Layers that share keys and values share them here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmserve.model.config import AttentionLayer, CacheConfig, ModelConfig
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


def allocate_cache(config: ModelConfig, cache: CacheConfig, device: torch.device) -> list[Tensor]:
    """For each layer zeros for K or for V: [num_blocks + 1, block_size, kv_heads, head_dim]."""
    dtype = DTYPES[cache.dtype]

    def zeros(layer: AttentionLayer) -> Tensor:
        shape = (cache.num_blocks + 1, cache.block_size, layer.num_kv_heads, layer.head_dim)
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # numpy's zeros take no memory before they are written, torch's do.
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

    cached = [zeros(layer) for layer in config.cached_layers]
    return [cached[place] for place in config.cache_places]


def attention(
    layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """What query [n, heads, rows, head_dim] sees of key and value [n, kv_heads, context, head_dim], of query's shape.

    mask: True where it may be seen, broadcast to [n, heads, rows, context]; None: causal from the first key on.
    sinks: [heads, rows or 1].
    """
    if layer.softcap is None and sinks is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=layer.scale, enable_gqa=True
        )
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2)).float() * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.float()[None, :, :, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


class Attention(Protocol):
    """Where keys and values go, and the attention that reads them."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the step's key and value [T, kv_heads, head_dim]."""

    def attend(self, layer: int, query: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Attention of query [T, heads, head_dim] (sinks: [heads]): [T, heads * head_dim]."""


class PagedAttention(Attention, Protocol):
    """Attention over a paged KV cache."""

    spare_block: int  # the block that belongs to no sequence

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block to another one, in all layers."""

    def begin(self, layout: StepLayout) -> None:
        """Prepare what all layers of a step share."""


def copy_block(stored: Sequence[Tensor], source: int, target: int) -> None:
    """Copy a block of each of these layers' keys or values, which some of them may share."""
    for tensor in {id(tensor): tensor for tensor in stored}.values():
        tensor[target] = tensor[source]


# A window, or None for no window.
Masks = dict[int | None, Tensor]


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences with one new token each, padded to the blocks of the longest."""

    tokens: Tensor  # [n] their rows among the step's tokens
    blocks: Tensor  # [n * blocks] block ids
    masks: Masks  # [n, 1, 1, blocks * block_size] True: seen


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence with several new tokens."""

    start: int
    end: int
    context: int
    blocks: Tensor  # [blocks]
    masks: Masks  # [new, context] True: seen; none where it is causal from the start


class SdpaAttention:
    """Gathers each sequence's blocks for torch's scaled_dot_product_attention: on every device and dtype."""

    def __init__(self, config: ModelConfig, cache: CacheConfig, device: torch.device) -> None:
        self.config = config
        self.block_size = cache.block_size
        self.keys, self.values = (allocate_cache(config, cache, device) for _ in range(2))
        self.spare_block = cache.num_blocks
        self.device = device
        self._windows = {layer.window for layer in config.attention}
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

    def copy_block(self, source: int, target: int) -> None:
        copy_block([*self.keys, *self.values], source, target)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.keys[layer].flatten(0, 1).index_copy_(0, self._slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, self._slots, value)

    def attend(self, layer: int, query: Tensor, sinks: Tensor | None = None) -> Tensor:
        shape, keys, values = self.config.attention[layer], self.keys[layer], self.values[layer]
        heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        out = torch.empty((len(query), heads, head_dim), dtype=query.dtype, device=query.device)
        for group in self._groups:
            n = len(group.tokens)
            whole = n == len(query)
            gathered = (n, -1, kv_heads, head_dim)
            members = query if whole else query[group.tokens]
            # The query heads of a key head are rows of one small matrix, so that each key is read once.
            attended = attention(
                shape,
                members.view(n, kv_heads, heads // kv_heads, head_dim),
                keys.index_select(0, group.blocks).view(gathered).transpose(1, 2),
                values.index_select(0, group.blocks).view(gathered).transpose(1, 2),
                mask=group.masks[shape.window],
                sinks=None if sinks is None else sinks.view(kv_heads, -1),
            )
            attended = attended.reshape(n, heads, head_dim)
            if whole:
                return attended.view(n, -1)
            out[group.tokens] = attended
        for chunk in self._chunks:
            key, value = (
                stored.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.context].transpose(0, 1)[None]
                for stored in (keys, values)
            )
            attended = attention(
                shape,
                query[chunk.start : chunk.end].transpose(0, 1)[None],
                key,
                value,
                mask=chunk.masks.get(shape.window),
                sinks=None if sinks is None else sinks[:, None],
            )
            out[chunk.start : chunk.end] = attended[0].transpose(0, 1)
        return out.view(len(query), -1)

    def _group(self, layout: StepLayout, sequences: NDArray[np.intp], width: int) -> _DecodeGroup:
        context = layout.context_lens[sequences]
        blocks = layout.block_tables[sequences, :width].astype(np.int64)
        # Entries past a sequence's context are undefined.
        blocks[np.arange(width)[None, :] * self.block_size >= context[:, None]] = self.spare_block
        keys = np.arange(width * self.block_size)[None, :]
        seen = keys < context[:, None]
        masks = {w: seen if w is None else seen & (keys >= context[:, None] - w) for w in self._windows}
        return _DecodeGroup(
            tokens=self._upload(layout.query_start[sequences].astype(np.int64)),
            blocks=self._upload(blocks.reshape(-1)),
            masks={window: self._upload(mask)[:, None, None, :] for window, mask in masks.items()},
        )

    def _chunk(self, layout: StepLayout, sequence: int) -> _Chunk:
        start, end = (int(row) for row in layout.query_start[sequence : sequence + 2])
        context = int(layout.context_lens[sequence])
        blocks = layout.block_tables[sequence, : -(-context // self.block_size)].astype(np.int64)
        before = context - (end - start)
        # Where the first token is the sequence's first and none is out of the window, the mask is causal.
        masked = {window for window in self._windows if before or (window is not None and window < context)}
        masks = {window: self._upload(_seen(before, context, window)) for window in masked}
        return _Chunk(start, end, context, self._upload(blocks), masks)

    def _upload(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _seen(first: int, last: int, window: int | None) -> NDArray[np.bool_]:
    """[last - first, last]: which keys the tokens first .. last of a sequence see."""
    keys, tokens = np.arange(last)[None, :], np.arange(first, last)[:, None]
    causal: NDArray[np.bool_] = keys <= tokens
    return causal if window is None else causal & (keys > tokens - window)


class PassAttention:
    """Causal attention of whole sequences among their own tokens, without a cache."""

    def __init__(self, config: ModelConfig, cu_seqlens: I32) -> None:
        self.config = config
        self._bounds = [int(row) for row in cu_seqlens]
        # Kept for the layers that share them; else those of the layer alone.
        self._shared = {layer.shares for layer in config.attention}
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._stored = {other: stored for other, stored in self._stored.items() if other in self._shared}
        self._stored[layer] = (key, value)

    def attend(self, layer: int, query: Tensor, sinks: Tensor | None = None) -> Tensor:
        shape = self.config.attention[layer]
        key, value = self._stored[layer if shape.shares is None else shape.shares]
        out = torch.empty_like(query)
        for start, end in zip(self._bounds, self._bounds[1:], strict=False):
            mask = None
            if shape.window is not None and shape.window < end - start:
                mask = torch.from_numpy(_seen(0, end - start, shape.window)).to(query.device)
            attended = attention(
                shape,
                query[start:end].transpose(0, 1)[None],
                key[start:end].transpose(0, 1)[None],
                value[start:end].transpose(0, 1)[None],
                mask=mask,
                sinks=None if sinks is None else sinks[:, None],
            )
            out[start:end] = attended[0].transpose(0, 1)
        return out.reshape(len(query), -1)


class WholeAttention:
    """Attention of whole sequences, each of whose tokens sees all of its own: they are padded to the longest."""

    def __init__(self, config: ModelConfig, cu_seqlens: I32) -> None:
        self.config = config
        lengths = np.diff(cu_seqlens)
        self._shape = (len(lengths), int(lengths.max()))
        self._seen = np.arange(self._shape[1])[None, :] < lengths[:, None]
        self._rows: Tensor | None = None  # places of the tokens among the padded ones; None: nothing is padded
        self._mask: Tensor | None = None
        self._stored: tuple[Tensor, Tensor] | None = None

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:  # noqa: ARG002
        if self._rows is None and not self._seen.all():
            self._rows = torch.from_numpy(np.flatnonzero(self._seen)).to(key.device)
            self._mask = torch.from_numpy(self._seen).to(key.device)[:, None, None, :]
        self._stored = (key, value)

    def attend(self, layer: int, query: Tensor, sinks: Tensor | None = None) -> Tensor:
        shape = self.config.attention[layer]
        if self._stored is None or sinks is not None or shape.softcap is not None or shape.window is not None:
            raise NotImplementedError("encoders have plain attention")
        q, k, v = (self._padded(part) for part in (query, *self._stored))
        attended = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._mask,
            scale=shape.scale,
            enable_gqa=True,
        )
        flat = attended.transpose(1, 2).flatten(0, 1)
        return (flat if self._rows is None else flat[self._rows]).reshape(len(query), -1)

    def _padded(self, rows: Tensor) -> Tensor:
        """[n, heads, longest, head_dim] of rows [T, heads, head_dim]."""
        if self._rows is not None:
            padded = rows.new_zeros((self._shape[0] * self._shape[1], *rows.shape[1:]))
            rows = padded.index_copy_(0, self._rows, rows)
        return rows.view(*self._shape, *rows.shape[1:]).transpose(1, 2)
