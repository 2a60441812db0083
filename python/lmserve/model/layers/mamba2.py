"""The mixer of Mamba-2 (Dao and Gu 2024): a causal convolution, a recurrence over a matrix for each head, a gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.activation import SILU
from lmserve.model.config import RecurrentLayer
from lmserve.model.layers.loading import Loader
from lmserve.model.ops import Ops

A = TypeVar("A")
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class Mamba2Shape:
    """What of a mixer its state does not say."""

    groups: int  # heads of keys and queries, and parts of the output that are normed by themselves
    conv_bias: bool
    bias: bool  # of the linear layers
    limits: tuple[float, float] = (0.0, math.inf)  # of the time step
    normed: bool = True  # the output is normalized after the gate


@dataclass(frozen=True, slots=True)
class Mamba2(Generic[W]):
    """Loaded weights."""

    inputs: W
    gate: W
    steps: W
    conv: W
    scan: W
    norm: W | None
    output: W


def load_mamba2(
    load: Loader[A, W], layer: RecurrentLayer, shape: Mamba2Shape, hidden_size: int, eps: float
) -> Mamba2[W]:
    """in_proj as in_proj_z, in_proj_xbc and in_proj_dt; conv1d, A, dt_bias and D, norm and out_proj."""
    inner = layer.heads * layer.columns
    return Mamba2(
        inputs=load.linear({"in_proj_xbc": layer.channels}, hidden_size, bias=shape.bias),
        gate=load.linear({"in_proj_z": inner}, hidden_size, bias=shape.bias),
        steps=load.linear({"in_proj_dt": layer.heads}, hidden_size, bias=shape.bias),
        conv=load.conv("conv1d", layer.channels, layer.kernel, bias=shape.conv_bias),
        scan=load.scan(layer.heads, skip=True, limits=shape.limits),
        norm=load.rms_norm("norm", inner, eps, parts=shape.groups) if shape.normed else None,
        output=load.linear({"out_proj": hidden_size}, inner, bias=shape.bias),
    )


def mamba2(
    ops: Ops[A, W], normed: A, layer: int, weights: Mamba2[W], *, gate_scale: float = 1.0, step_scale: float = 1.0
) -> A:
    """[T, heads * columns], before the output's linear layer; `layer` is an entry of `recurrent`.

    What the linear layers of the gate and of the time step give is multiplied by their scales.
    """
    inputs = ops.conv(ops.linear(normed, weights.inputs), layer, weights.conv, "silu")
    steps, gate = ops.linear(normed, weights.steps), ops.linear(normed, weights.gate)
    steps = steps if step_scale == 1 else ops.scale(steps, step_scale)
    gate = gate if gate_scale == 1 else ops.scale(gate, gate_scale)
    gated = ops.activate(gate, SILU, ops.scan(inputs, steps, layer, weights.scan, "mamba"))
    return gated if weights.norm is None else ops.norm(gated, weights.norm)
