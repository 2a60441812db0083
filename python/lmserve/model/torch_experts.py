"""Mixtures of experts in torch: loaded routers and experts, and what they do with rows of activations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from lmserve.model.activation import Activation
from lmserve.model.router import Router
from lmserve.model.torch_activation import activate, gated
from lmserve.model.torch_routers import KINDS
from lmserve.model.torch_weight import TorchWeight


@dataclass(frozen=True, slots=True)
class TorchRouter(TorchWeight):
    """Weight [experts, hidden] and bias of a router, and its numbers for each expert, all float32."""

    correction: Tensor | None = None
    scale: Tensor | None = None
    router: Router = field(kw_only=True)

    def route(self, x: Tensor) -> Tensor:
        """[n, 2 * top_k] of x [n, hidden], float32: the numbers of the chosen experts, then their weights."""
        logits = functional.linear(x.float(), self.weight, self.bias)
        chosen, weights = KINDS[self.router.kind](logits, self.router, self.correction)
        weights = weights * self.router.factor
        if self.scale is not None:
            weights = weights * self.scale[chosen]
        return torch.cat((chosen.float(), weights), dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchExperts(TorchWeight):
    """Gate and up as one weight [experts, 2 * inner, hidden] and bias; down [experts, hidden, inner] and its bias.

    If they are not `gated`, only up [experts, inner, hidden].
    """

    down: Tensor
    down_bias: Tensor | None
    activation: Activation
    scaled_inputs: bool
    gated: bool

    def apply(self, x: Tensor, routing: Tensor) -> Tensor:
        """[n, hidden]: what the chosen experts make of x, weighted and added in the order of the choice."""
        chosen, weights = routing.chunk(2, dim=-1)
        pairs = chosen.long().reshape(-1)
        scales = weights.reshape(-1, 1).to(x.dtype)
        rows = x.repeat_interleave(chosen.shape[1], dim=0)
        if self.scaled_inputs:
            rows = rows * scales
        outputs = self._grouped(rows, pairs)
        if not self.scaled_inputs:
            outputs = outputs * scales
        return outputs.view(*chosen.shape, x.shape[-1]).sum(1)

    def _grouped(self, rows: Tensor, pairs: Tensor) -> Tensor:
        """What each row's expert makes of it. Sorted by expert, a grouped product takes them all: nothing waits for the
        device.
        """
        order = pairs.argsort(stable=True)
        experts = pairs[order]
        counts = torch.zeros(len(self.down), dtype=torch.int32, device=pairs.device)
        ends = counts.index_add_(0, pairs, torch.ones_like(pairs, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        gate_up = functional.grouped_mm(rows[order], self.weight.transpose(1, 2), offs=ends)
        if self.bias is not None:
            gate_up = gate_up + self.bias[experts]
        inner = gated(gate_up, self.activation) if self.gated else activate(gate_up, self.activation)
        outputs = functional.grouped_mm(inner, self.down.transpose(1, 2), offs=ends)
        if self.down_bias is not None:
            outputs = outputs + self.down_bias[experts]
        return torch.empty_like(outputs).index_copy_(0, order, outputs)
