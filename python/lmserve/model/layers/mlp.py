"""Feed-forward networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.activation import SILU, Activation
from lmserve.model.layers.loading import Loader
from lmserve.model.ops import Ops

A = TypeVar("A")
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class GatedMlp(Generic[W]):
    """Loaded weights."""

    gate_up: W
    down: W


@dataclass(frozen=True, slots=True)
class PlainMlp(Generic[W]):
    """Loaded weights of one without a gate."""

    up: W
    down: W


def load_gated_mlp(load: Loader[A, W], hidden_size: int, inner: int, *, bias: bool = False) -> GatedMlp[W]:
    """gate_proj, up_proj and down_proj."""
    return GatedMlp(
        gate_up=load.linear({"gate_proj": inner, "up_proj": inner}, hidden_size, bias=bias),
        down=load.linear({"down_proj": hidden_size}, inner, bias=bias),
    )


def gated_mlp(ops: Ops[A, W], x: A, weights: GatedMlp[W], activation: Activation = SILU) -> A:
    """down(activation(gate(x)) * up(x))."""
    return ops.linear(ops.gated(ops.linear(x, weights.gate_up), activation), weights.down)


def load_plain_mlp(
    load: Loader[A, W], names: tuple[str, str], hidden_size: int, inner: int, *, bias: bool
) -> PlainMlp[W]:
    """The two linear layers, which each family names otherwise."""
    up, down = names
    return PlainMlp(
        up=load.linear({up: inner}, hidden_size, bias=bias), down=load.linear({down: hidden_size}, inner, bias=bias)
    )


def plain_mlp(ops: Ops[A, W], x: A, weights: PlainMlp[W], activation: Activation) -> A:
    """down(activation(up(x)))."""
    return ops.linear(ops.activate(ops.linear(x, weights.up), activation), weights.down)


def network(ops: Ops[A, W], x: A, weights: GatedMlp[W] | PlainMlp[W], activation: Activation) -> A:
    """What a feed-forward network of either kind makes of x."""
    if isinstance(weights, PlainMlp):
        return plain_mlp(ops, x, weights, activation)
    return gated_mlp(ops, x, weights, activation)
