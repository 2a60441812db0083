"""The gated delta net of Qwen3-Next and Qwen3.5: a causal convolution and a recurrence over a matrix for each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.activation import SILU
from lmserve.model.config import RecurrentLayer
from lmserve.model.layers.loading import Loader
from lmserve.model.ops import Ops, ScanRule

A = TypeVar("A")
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class DeltaNet(Generic[W]):
    """Loaded weights."""

    qkv: W
    gate: W
    steps: W
    conv: W
    scan: W
    norm: W
    output: W
    rule: ScanRule


def load_delta_net(load: Loader[A, W], layer: RecurrentLayer, hidden_size: int, eps: float) -> DeltaNet[W]:
    """in_proj_qkv, in_proj_z, in_proj_b and in_proj_a, conv1d, A and dt_bias, norm and out_proj."""
    inner = layer.heads * layer.columns
    return DeltaNet(
        qkv=load.linear({"in_proj_qkv": layer.channels}, hidden_size),
        gate=load.linear({"in_proj_z": inner}, hidden_size),
        steps=load.linear({"in_proj_b": layer.heads, "in_proj_a": layer.heads}, hidden_size),
        conv=load.conv("conv1d", layer.channels, layer.kernel),
        scan=load.scan(layer.heads),
        norm=load.rms_norm("norm", layer.columns, eps),
        output=load.linear({"out_proj": hidden_size}, inner),
        rule="delta_tiled" if layer.tiled else "delta",
    )


def delta_net(ops: Ops[A, W], normed: A, layer: int, weights: DeltaNet[W]) -> A:
    """[T, heads * columns], before the output's linear layer; `layer` is an entry of `recurrent`."""
    qkv = ops.conv(ops.linear(normed, weights.qkv), layer, weights.conv, "silu")
    mixed = ops.scan(qkv, ops.linear(normed, weights.steps), layer, weights.scan, weights.rule)
    return ops.activate(ops.linear(normed, weights.gate), SILU, ops.norm(mixed, weights.norm))
