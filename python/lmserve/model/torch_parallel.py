"""`Ops` of one rank of a tensor-parallel group: `TorchOps` over its parts of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from lmserve.model.activation import Activation
from lmserve.model.config import CacheConfig, ModelConfig
from lmserve.model.errors import OptionError
from lmserve.model.expert_tensors import ExpertSources
from lmserve.model.interface import LogitEdits, StepBuffers
from lmserve.model.shares import Part
from lmserve.model.tensors import TensorSource
from lmserve.model.torch_attention import DTYPES
from lmserve.model.torch_experts import TorchExperts
from lmserve.model.torch_ops import TorchOps
from lmserve.model.torch_ranks import Ranks
from lmserve.model.torch_weight import TorchWeight

# torch multiplies the rows of several experts at once only where a row is of a multiple of so many bytes.
GROUPED_BYTES: Final = 16


class ParallelOps(TorchOps):
    """Adds up what ranks compute of a row, and samples on rank 0. All ranks compute the same step."""

    def __init__(
        self,
        config: ModelConfig,
        cache: CacheConfig,
        buffers: StepBuffers,
        *,
        ranks: Ranks,
        vocab_size: int,
        device: str = "cpu",
        dtype: str = "fp32",
    ) -> None:
        """config: of this rank. vocab_size: of all ranks."""
        super().__init__(config, cache, buffers, device=device, dtype=dtype)
        self.ranks = ranks
        self._vocab_size = vocab_size

    def _load_linear(self, sources: Sequence[TensorSource], bias: Sequence[TensorSource] | None) -> TorchWeight:
        return _marked(super()._load_linear(sources, bias), sources[0])

    def load_embedding(self, source: TensorSource, *, head: bool) -> TorchWeight:
        return _marked(super().load_embedding(source, head=head), source)

    def load_rms_norm(self, source: TensorSource, eps: float, parts: int = 1) -> TorchWeight:
        return _marked(super().load_rms_norm(source, eps, parts), source)

    def load_heads(self, source: TensorSource) -> TorchWeight:
        return super().load_heads(source.rows() if isinstance(source, Part) else source)

    def load_experts(
        self, sources: ExpertSources, activation: Activation, *, scaled_inputs: bool = False
    ) -> TorchExperts:
        biases = sources.biases
        width = sources.up.shape[1]
        if width * DTYPES[self.dtype].itemsize % GROUPED_BYTES:
            ranks = self.ranks.share.ranks
            message = f"tensor_parallel is {ranks}; experts of width {width} on each are no multiple of {GROUPED_BYTES}"
            raise OptionError("tensor_parallel", f"{message} bytes of {self.dtype}, which torch needs")
        own = ExpertSources(
            None if sources.gate is None else _by_expert(sources.gate),
            _by_expert(sources.up),
            _by_expert(sources.down),
            None if biases is None else (_by_expert(biases[0]), _by_expert(biases[1]), _by_expert(biases[2])),
        )
        loaded = super().load_experts(own, activation, scaled_inputs=scaled_inputs)
        if not isinstance(sources.down, Part):
            return loaded
        # What all ranks add would count as often as there are ranks.
        bias = loaded.down_bias if self.ranks.share.rank == 0 else None
        return replace(loaded, axis=1, down_bias=bias)

    def embed(self, w: TorchWeight, scale: float = 1.0) -> Tensor:
        if w.axis is None:
            return super().embed(w, scale)
        rows = self.token_ids - w.start
        here = (rows >= 0) & (rows < len(w.weight))
        found = functional.embedding(rows.where(here, 0), w.weight) * here[:, None]
        return self.ranks.add(found if scale == 1 else found * scale)

    def norm(self, x: Tensor, w: TorchWeight) -> Tensor:
        if w.axis is None:
            return super().norm(x, w)
        # Ranks that have the same heads count them equally often.
        squares = self.ranks.add(x.float().pow(2).mean(-1, keepdim=True)) / self.ranks.share.ranks
        return (x.float() * torch.rsqrt(squares + w.eps)).to(x.dtype) * w.weight

    def linear(self, x: Tensor, w: TorchWeight) -> Tensor:
        if w.axis != 1:
            return super().linear(x, w)
        # An adapter reads the same inputs as the weight, so its part is added up with it.
        total = self.ranks.add(self.adapters.add(x, functional.linear(x, w.weight), w))
        return total if w.bias is None else total + w.bias

    def experts(self, x: Tensor, routing: Tensor, w: TorchWeight) -> Tensor:
        mixed = super().experts(x, routing, w)
        return mixed if w.axis is None else self.ranks.add(mixed)

    def sample(self, x: Tensor, head: TorchWeight, edits: LogitEdits | None) -> None:
        logits: Tensor | None = self.raw_logits(x, head)
        if head.axis is not None and logits is not None:
            logits = self.ranks.gather_columns(logits, self._vocab_size)
        if self.ranks.share.rank == 0 and logits is not None:
            self.sample_logits(logits, edits)


def _marked(weight: TorchWeight, source: TensorSource) -> TorchWeight:
    return replace(weight, axis=source.axis, start=source.start) if isinstance(source, Part) else weight


def _by_expert(source: TensorSource) -> TensorSource:
    return source.experts() if isinstance(source, Part) else source
