"""Paged attention in torch: the KV cache, its layout, and how a step reads it, one class for each kernel.

K and V of a layer are [num_blocks + 1, block_size, kv_heads, head_dim]. The block past the last belongs to no sequence:
padding writes to it and reads from it. Layers that share keys and values share them here. Where layers with a window
have blocks of their own, theirs are [num_window_blocks + 1, ...].
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
    # Of layers with a window that have blocks of their own; else empty.
    window_tables: I32
    device_window_tables: Tensor
    window_slots: Tensor


def allocate_cache(config: ModelConfig, cache: CacheConfig, device: torch.device) -> list[Tensor]:
    """For each layer zeros for K or for V: [num_blocks + 1, block_size, kv_heads, head_dim]."""
    dtype = DTYPES[cache.dtype]

    def zeros(layer: AttentionLayer, windowed: bool) -> Tensor:
        shape = (
            (cache.num_window_blocks if windowed else cache.num_blocks) + 1,
            cache.block_size,
            layer.num_kv_heads,
            layer.head_dim,
        )
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # numpy's zeros take no memory before they are written, torch's do.
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

    windowed = dict(zip(config.cache_places, cache.windowed(config), strict=True))
    cached = [zeros(layer, windowed[place]) for place, layer in enumerate(config.cached_layers)]
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

    def attend(self, layer: int, query: Tensor, sinks: Tensor | None = None, distances: Tensor | None = None) -> Tensor:
        """Attention of query [T, heads, head_dim] (sinks: [heads]): [T, heads * head_dim].

        distances: see `Ops.load_distances`; only encoders have them.
        """


class PagedAttention(Attention, Protocol):
    """Attention over a paged KV cache."""

    spare_block: int  # the block that belongs to no sequence
    spare_window_block: int  # that of layers with a window

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
class _Keys:
    """The keys of a group or a chunk, in the layers that have the same blocks."""

    blocks: Tensor  # block ids: of a chunk [blocks], of a group [n * blocks]
    count: int  # of a chunk's keys
    masks: (
        Masks  # True: seen. Of a group [n, 1, 1, blocks * block_size]; of a chunk [new, count], none where it is causal
    )


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences with one new token each, padded to the blocks of the longest."""

    tokens: Tensor  # [n] their rows among the step's tokens
    keys: tuple[_Keys, _Keys | None]  # of all layers, but for those with a window and blocks of their own


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence with several new tokens."""

    start: int
    end: int
    keys: tuple[_Keys, _Keys | None]  # as a group's


class SdpaAttention:
    """Gathers each sequence's blocks for torch's scaled_dot_product_attention: on every device and dtype."""

    def __init__(self, config: ModelConfig, cache: CacheConfig, device: torch.device) -> None:
        self.config = config
        self.block_size = cache.block_size
        self.keys, self.values = (allocate_cache(config, cache, device) for _ in range(2))
        self.spare_block, self.spare_window_block = cache.num_blocks, cache.num_window_blocks
        self.device = device
        self._windowed = cache.windowed(config)
        self._windows = {layer.window for layer in config.attention}
        # The widest of the layers that have blocks of their own.
        own = zip(config.attention, self._windowed, strict=True)
        self._widest = max((layer.window or 0 for layer, windowed in own if windowed), default=0)
        self._slots = self._window_slots = torch.empty(0, dtype=torch.int64)
        self._groups: list[_DecodeGroup] = []
        self._chunks: list[_Chunk] = []

    def begin(self, layout: StepLayout) -> None:
        self._slots, self._window_slots = layout.slots, layout.window_slots
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
        slots = self._window_slots if self._windowed[layer] else self._slots
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def attend(self, layer: int, query: Tensor, sinks: Tensor | None = None, distances: Tensor | None = None) -> Tensor:
        _refuse(distances)
        shape, keys, values = self.config.attention[layer], self.keys[layer], self.values[layer]
        heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        out = torch.empty((len(query), heads, head_dim), dtype=query.dtype, device=query.device)
        windowed = self._windowed[layer]
        for group in self._groups:
            seen = _of(group.keys, windowed)
            n = len(group.tokens)
            whole = n == len(query)
            gathered = (n, -1, kv_heads, head_dim)
            members = query if whole else query[group.tokens]
            # The query heads of a key head are rows of one small matrix, so that each key is read once.
            attended = attention(
                shape,
                members.view(n, kv_heads, heads // kv_heads, head_dim),
                keys.index_select(0, seen.blocks).view(gathered).transpose(1, 2),
                values.index_select(0, seen.blocks).view(gathered).transpose(1, 2),
                mask=seen.masks[shape.window],
                sinks=None if sinks is None else sinks.view(kv_heads, -1),
            )
            attended = attended.reshape(n, heads, head_dim)
            if whole:
                return attended.view(n, -1)
            out[group.tokens] = attended
        for chunk in self._chunks:
            seen = _of(chunk.keys, windowed)
            key, value = (
                stored.index_select(0, seen.blocks).flatten(0, 1)[: seen.count].transpose(0, 1)[None]
                for stored in (keys, values)
            )
            attended = attention(
                shape,
                query[chunk.start : chunk.end].transpose(0, 1)[None],
                key,
                value,
                mask=seen.masks.get(shape.window),
                sinks=None if sinks is None else sinks[:, None],
            )
            out[chunk.start : chunk.end] = attended[0].transpose(0, 1)
        return out.view(len(query), -1)

    def _group(self, layout: StepLayout, sequences: NDArray[np.intp], width: int) -> _DecodeGroup:
        context = layout.context_lens[sequences][:, None]
        whole = np.broadcast_to(np.arange(width), (len(sequences), width))
        keys = self._group_keys(layout.block_tables[sequences], context, whole, self.spare_block)
        window_keys = None
        if self._widest:
            first = np.maximum(context - self._widest, 0) // self.block_size
            span = int((-(-context // self.block_size) - first).max())
            tables = layout.window_tables[sequences]
            window_keys = self._group_keys(tables, context, first + np.arange(span), self.spare_window_block)
        return _DecodeGroup(self._upload(layout.query_start[sequences].astype(np.int64)), (keys, window_keys))

    def _group_keys(self, tables: I32, context: I32, columns: NDArray[np.intp], spare: int) -> _Keys:
        """Those in `columns` [n, blocks] of the tables; entries past a sequence's context [n, 1] are undefined."""
        blocks = np.take_along_axis(tables, np.minimum(columns, tables.shape[1] - 1), 1).astype(np.int64)
        blocks[columns * self.block_size >= context] = spare
        keys = (columns[:, :, None] * self.block_size + np.arange(self.block_size)).reshape(len(columns), -1)
        seen = keys < context
        masks = {w: seen if w is None else seen & (keys >= context - w) for w in self._windows}
        return _Keys(
            self._upload(blocks.reshape(-1)),
            keys.shape[1],
            {window: self._upload(mask)[:, None, None, :] for window, mask in masks.items()},
        )

    def _chunk(self, layout: StepLayout, sequence: int) -> _Chunk:
        start, end = (int(row) for row in layout.query_start[sequence : sequence + 2])
        context = int(layout.context_lens[sequence])
        before = context - (end - start)
        keys = self._chunk_keys(layout.block_tables[sequence], before, context, 0)
        window_keys = None
        if self._widest:
            first = max(before + 1 - self._widest, 0) // self.block_size
            window_keys = self._chunk_keys(layout.window_tables[sequence], before, context, first)
        return _Chunk(start, end, (keys, window_keys))

    def _chunk_keys(self, table: I32, before: int, context: int, first: int) -> _Keys:
        """Those from the block `first` of its table on."""
        blocks = table[first : -(-context // self.block_size)].astype(np.int64)
        passed = first * self.block_size
        # Where the first token is the sequence's first and none is out of the window, the mask is causal.
        masked = {window for window in self._windows if before or (window is not None and window < context)}
        masks = {window: self._upload(_seen(before, context, window)[:, passed:]) for window in masked}
        return _Keys(self._upload(blocks), context - passed, masks)

    def _upload(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _of(keys: tuple[_Keys, _Keys | None], windowed: bool) -> _Keys:
    whole, window = keys
    return window if windowed and window is not None else whole


def _refuse(distances: Tensor | None) -> None:
    if distances is not None:
        raise NotImplementedError("addends by distance are of encoders")


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

    def attend(self, layer: int, query: Tensor, sinks: Tensor | None = None, distances: Tensor | None = None) -> Tensor:
        _refuse(distances)
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
    """Attention of whole sequences whose tokens see those after them too: they are padded to the longest."""

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

    def attend(self, layer: int, query: Tensor, sinks: Tensor | None = None, distances: Tensor | None = None) -> Tensor:
        shape = self.config.attention[layer]
        if self._stored is None or sinks is not None or shape.softcap is not None:
            raise NotImplementedError("encoders have no sinks and no soft-cap")
        q, k, v = (self._padded(part) for part in (query, *self._stored))
        mask = self._mask
        if distances is not None or (shape.window is not None and shape.window < self._shape[1]):
            mask = self._by_distance(shape, q, distances)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=shape.scale, enable_gqa=True)
        flat = attended.transpose(1, 2).flatten(0, 1)
        return (flat if self._rows is None else flat[self._rows]).reshape(len(query), -1)

    def _by_distance(self, shape: AttentionLayer, query: Tensor, distances: Tensor | None) -> Tensor:
        """What is added to scores, broadcast to [n, heads, longest, longest]; or, with a window alone, what is seen."""
        places = torch.arange(self._shape[1], device=query.device)
        after = places[None, :] - places[:, None]
        seen = torch.ones_like(after, dtype=torch.bool) if shape.window is None else after.abs() < shape.window
        # A padded row sees itself at least, so that it is a number.
        seen = seen if self._mask is None else (seen & self._mask) | (after == 0)
        if distances is None:
            return seen
        added = distances[:, after + distances.shape[1] // 2].to(query.dtype)
        return torch.where(seen, added, torch.full_like(added, -torch.inf))

    def _padded(self, rows: Tensor) -> Tensor:
        """[n, heads, longest, head_dim] of rows [T, heads, head_dim]."""
        if self._rows is not None:
            padded = rows.new_zeros((self._shape[0] * self._shape[1], *rows.shape[1:]))
            rows = padded.index_copy_(0, self._rows, rows)
        return rows.view(*self._shape, *rows.shape[1:]).transpose(1, 2)
