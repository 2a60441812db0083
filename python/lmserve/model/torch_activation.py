"""The functions between the linear layers of feed-forward networks, in torch; see `lmserve.model.activation`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lmserve.model.activation import Activation


def activate(x: Tensor, activation: Activation, factor: Tensor | None = None) -> Tensor:
    """activation(x), times `factor` where there is one; all of one shape."""
    match activation.name:
        case "silu":
            activated = functional.silu(x)
        case "sigmoid":
            activated = torch.sigmoid(x)
        case "gelu":
            activated = functional.gelu(x)
        case "gelu_tanh":
            activated = functional.gelu(x, approximate="tanh")
        case "relu":
            activated = functional.relu(x)
        case "relu2":
            activated = functional.relu(x).square()
        case "xielu":
            positive, negative, beta = activation.parameters
            below = x.clamp(max=0)
            activated = positive * x.clamp(min=0).square() + negative * (torch.expm1(below) - below) + beta * x
        case "clamped_swiglu":
            alpha, limit = activation.parameters
            x = x.clamp(max=limit)
            activated = x * torch.sigmoid(alpha * x)
            factor = None if factor is None else factor.clamp(-limit, limit) + 1
        case _:
            raise ValueError(f"there is no activation {activation.name!r}")
    return activated if factor is None else activated * factor


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up of gate_up [n, 2 * width] = gate | up: [n, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, activation, up)
