"""The loading of weights into torch tensors, for the operations of `torch_ops.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lmserve.model.activation import Activation
from lmserve.model.expert_tensors import ExpertSources, split
from lmserve.model.interface import F32
from lmserve.model.linears import Linears
from lmserve.model.router import Router
from lmserve.model.tensors import TensorSource
from lmserve.model.torch_adapters import TorchAdapters
from lmserve.model.torch_attention import DTYPES
from lmserve.model.torch_experts import TorchExperts, TorchRouter
from lmserve.model.torch_scan import TorchScan
from lmserve.model.torch_weight import TorchWeight


class TorchLoader:
    """The loading half of `Ops` with W = TorchWeight: each tensor is converted to `dtype` and moved to `device`."""

    def __init__(self, device: str, dtype: str, *, packed: bool = False) -> None:
        """packed: linear layers and embeddings keep weights as they are stored, of types that there is a kernel for."""
        self.device = device
        self.dtype = dtype
        self.weight_bytes = 0
        self.linears: Linears[TorchWeight] = Linears()
        self.adapters = TorchAdapters(self._as_weights)
        self._device = torch.device(device)
        self._packed = packed
        self._dtype = DTYPES[dtype]

    def load_linear(self, sources: Sequence[TensorSource], bias: Sequence[TensorSource] | None = None) -> TorchWeight:
        weight = self._load_linear(sources, bias)
        self.linears.add(weight, sources)
        return weight

    def _load_linear(self, sources: Sequence[TensorSource], bias: Sequence[TensorSource] | None) -> TorchWeight:
        return self._load_matrix(sources, None if bias is None else self._load(bias))

    def load_embedding(self, source: TensorSource, *, head: bool) -> TorchWeight:
        del head  # one layout serves both uses
        return self._load_matrix([source])

    def load_rms_norm(self, source: TensorSource, eps: float, parts: int = 1) -> TorchWeight:
        return TorchWeight(self._load([source]), eps=eps, parts=parts)

    def load_layer_norm(self, source: TensorSource, bias: TensorSource | None, eps: float) -> TorchWeight:
        return TorchWeight(self._load([source]), None if bias is None else self._load([bias]), eps, centered=True)

    def load_heads(self, source: TensorSource) -> TorchWeight:
        return TorchWeight(self._load_experts([source]))

    def load_sinks(self, source: TensorSource) -> TorchWeight:
        return TorchWeight(self._load([source]))

    def load_distances(self, source: TensorSource) -> TorchWeight:
        return TorchWeight(self._load([source], torch.float32))

    def load_router(
        self,
        source: TensorSource,
        router: Router,
        *,
        bias: TensorSource | None = None,
        correction: TensorSource | None = None,
        scale: TensorSource | None = None,
    ) -> TorchRouter:
        def load(source: TensorSource) -> Tensor:
            return self._load([source], torch.float32)

        return TorchRouter(
            load(source),
            None if bias is None else load(bias),
            correction=None if correction is None else load(correction),
            scale=None if scale is None else load(scale),
            router=router,
        )

    def load_experts(
        self, sources: ExpertSources, activation: Activation, *, scaled_inputs: bool = False
    ) -> TorchExperts:
        biases = sources.biases
        return TorchExperts(
            weight=self._load_experts([source for source in (sources.gate, sources.up) if source is not None]),
            bias=None if biases is None else self._load_experts(biases[:2]),
            down=self._load_experts([sources.down]),
            down_bias=None if biases is None else self._load_experts(biases[2:]),
            activation=activation,
            scaled_inputs=scaled_inputs,
            gated=sources.gate is not None,
        )

    def load_conv(self, source: TensorSource, bias: TensorSource | None = None) -> TorchWeight:
        return TorchWeight(self._load([source]), None if bias is None else self._load([bias]))

    def load_scan(
        self,
        decay: TensorSource,
        bias: TensorSource,
        skip: TensorSource | None = None,
        limits: tuple[float, float] = (0.0, math.inf),
    ) -> TorchScan:
        def load(source: TensorSource) -> Tensor:
            return self._load([source], torch.float32)

        return TorchScan(load(decay), load(bias), skip=None if skip is None else load(skip), limits=limits)

    def _as_weights(self, values: F32) -> Tensor:
        # A copy: torch takes no read-only array.
        return torch.from_numpy(values.copy()).to(self._device, self._dtype)

    def _load(self, sources: Sequence[TensorSource], dtype: torch.dtype | None = None) -> Tensor:
        rows = sum(source.shape[0] for source in sources)
        loaded = torch.empty((rows, *sources[0].shape[1:]), dtype=dtype or self._dtype, device=self._device)
        _fill(loaded, sources)
        self.weight_bytes += loaded.nbytes
        return loaded

    def _load_matrix(self, sources: Sequence[TensorSource], bias: Tensor | None = None) -> TorchWeight:
        if self._packed:
            # Imported late: it brings triton, which is not everywhere.
            from lmserve.model import torch_packed

            packed = torch_packed.load(
                sources, bias, lambda source: self._load([source]), device=self._device, dtype=self._dtype
            )
            if packed is not None:
                self.weight_bytes += packed.packed_bytes
                return packed
        return TorchWeight(self._load(sources), bias)

    def _load_experts(self, stacked: Sequence[TensorSource]) -> Tensor:
        """[experts, rows of all, ...]; one expert after the other: all as floats may take more memory than there is."""
        rows = sum(source.shape[1] for source in stacked)
        shape = (stacked[0].shape[0], rows, *stacked[0].shape[2:])
        loaded = torch.empty(shape, dtype=self._dtype, device=self._device)
        for target, sources in zip(loaded, zip(*map(split, stacked), strict=True), strict=True):
            _fill(target, sources)
        self.weight_bytes += loaded.nbytes
        return loaded


def _fill(target: Tensor, sources: Sequence[TensorSource]) -> None:
    """Write the values of sources one after the other."""
    start = 0
    for source in sources:
        # copy_ converts to the dtype; the copy makes mapped, read-only memory writable, as torch wants it.
        values = np.array(source.dequantize(), copy=True)
        target[start : start + len(values)].copy_(torch.from_numpy(values))
        start += len(values)
