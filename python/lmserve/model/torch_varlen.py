"""Paged attention by torch's variable-length kernel, for CUDA: one call a layer for any mix of sequences.

The tests hold it to a stand-in of the kernel on the CPU; on a GPU it has not run yet.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.nn.attention import varlen

from lmserve.model.config import CacheConfig, ModelConfig
from lmserve.model.torch_attention import StepLayout, allocate_cache, copy_block

# FlashAttention 2 reads pages of a multiple of this many tokens.
PAGE_TOKENS = 256


def varlen_fits(config: ModelConfig, cache: CacheConfig, device: torch.device) -> bool:
    """Whether this torch, device, dtype and cache shape let the kernel be used."""
    return (
        device.type == "cuda"
        and "block_table" in inspect.signature(varlen.varlen_attn).parameters
        and cache.dtype in ("fp16", "bf16")
        and cache.block_size % PAGE_TOKENS == 0
        and all(
            layer.head_dim <= 256 and layer.head_dim % 8 == 0 and layer.softcap is None and not layer.sinks
            for layer in config.attention
        )
    )


class VarlenAttention:
    """`PagedAttention` by `varlen_attn` with a block table: it reads what a step is from device memory alone."""

    def __init__(self, config: ModelConfig, cache: CacheConfig, device: torch.device) -> None:
        self.config = config
        self.keys, self.values = (allocate_cache(config, cache, device) for _ in range(2))
        self.spare_block, self.spare_window_block = cache.num_blocks, cache.num_window_blocks
        self._windowed = cache.windowed(config)
        self._layout: StepLayout | None = None
        self._most_new = self._longest = 0

    def begin(self, layout: StepLayout) -> None:
        self._layout = layout
        starts = layout.query_start
        self._most_new = int((starts[1:] - starts[:-1]).max())
        self._longest = int(layout.context_lens.max())

    def copy_block(self, source: int, target: int) -> None:
        copy_block([*self.keys, *self.values], source, target)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        layout = self._step()
        slots = layout.window_slots if self._windowed[layer] else layout.slots
        self.keys[layer].view(-1, *key.shape[1:]).index_copy_(0, slots, key)
        self.values[layer].view(-1, *value.shape[1:]).index_copy_(0, slots, value)

    def attend(self, layer: int, query: Tensor, sinks: Tensor | None = None, distances: Tensor | None = None) -> Tensor:
        if sinks is not None or distances is not None:
            raise NotImplementedError("sinks and distances are not among what the variable-length kernel computes")
        layout, shape = self._step(), self.config.attention[layer]
        attended = varlen.varlen_attn(
            query,
            self.keys[layer],
            self.values[layer],
            layout.device_query_start,
            None,
            self._most_new,
            self._longest,
            scale=shape.scale,
            window_size=(-1 if shape.window is None else shape.window - 1, 0),
            enable_gqa=True,
            seqused_k=layout.device_context_lens,
            block_table=layout.device_window_tables if self._windowed[layer] else layout.device_block_tables,
        )
        assert isinstance(attended, Tensor)
        return attended.view(len(query), -1)

    def _step(self) -> StepLayout:
        if self._layout is None:
            raise RuntimeError("attention before begin")
        return self._layout
