"""The short convolution of LFM2: gates around a causal convolution, whose last inputs are the layer's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.config import RecurrentLayer
from lmserve.model.layers.loading import Loader
from lmserve.model.ops import Ops

A = TypeVar("A")
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class ShortConv(Generic[W]):
    """Loaded weights."""

    inputs: W
    conv: W
    output: W


def load_short_conv(load: Loader[A, W], layer: RecurrentLayer, hidden_size: int, *, bias: bool) -> ShortConv[W]:
    """in_proj, conv and out_proj."""
    return ShortConv(
        inputs=load.linear({"in_proj": 3 * hidden_size}, hidden_size, bias=bias),
        conv=load.conv("conv", hidden_size, layer.kernel, bias=bias),
        output=load.linear({"out_proj": hidden_size}, hidden_size, bias=bias),
    )


def short_conv(ops: Ops[A, W], normed: A, layer: int, weights: ShortConv[W]) -> A:
    """c * conv(b * x), [T, hidden], before the output's linear layer; `layer` is an entry of `recurrent`."""
    return ops.conv(ops.linear(normed, weights.inputs), layer, weights.conv, "inputs")
