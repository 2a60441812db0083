"""How checkpoints store what recurrent layers load: the decay of a state, the weights of a convolution, and mixers; and
what configurations say of a mixer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lmserve.model.config import ModelConfig, RecurrentLayer
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Tensors
from lmserve.model.layers.mamba2 import Mamba2Shape
from lmserve.model.tensors import F32, DerivedTensor, StoredTensor, TensorSource

# Of the mixers of Mamba-2 in GGUF files, but those that no `.weight` or `.bias` is behind.
MAMBA_NAMES = {
    "ssm_in": "in_proj",
    "ssm_conv1d": "conv1d",
    "ssm_dt": "dt",
    "ssm_norm": "norm",
    "ssm_out": "out_proj",
}


class DecayTensor(DerivedTensor):
    """-e^x of another's values x."""

    __slots__ = ()

    def dequantize(self) -> F32:
        decay: F32 = -np.exp(self.source.dequantize())
        return decay


@dataclass(frozen=True, slots=True)
class ScaledRows(DerivedTensor):
    """Another's values, each row [of the first dimension] times its own factor."""

    factors: F32

    def dequantize(self) -> F32:
        values: F32 = self.source.dequantize() * self.factors.reshape(-1, *[1] * (len(self.shape) - 1))
        return values

    def select_rows(self, rows: NDArray[np.int64]) -> Self:
        return replace(self, source=self.source.select_rows(rows), factors=self.factors[rows])


def decay_tensors(tensors: Tensors) -> Tensors:
    """The tensors with A, which is negative, in place of A_log, the logarithm of what it is the opposite of."""
    return {
        name.removesuffix("_log") if name.endswith(".A_log") else name: DecayTensor(tensor)
        if name.endswith(".A_log")
        else tensor
        for name, tensor in tensors.items()
    }


def conv_tensor(tensor: TensorSource) -> TensorSource:
    """The weight of a convolution, [channels, kernel] in GGUF files, as [channels, 1, kernel]."""
    if not isinstance(tensor, StoredTensor) or len(tensor.shape) != 2:
        return tensor
    shape = (tensor.shape[0], 1, tensor.shape[1])
    return replace(tensor, shape=shape, data=tensor.data.reshape(shape))


def mamba_tensors(tensors: Tensors, config: ModelConfig, mixer: str) -> Tensors:
    """The tensors with those of Mamba-2's mixers, `mixer` of a layer, under the names and in the shapes that it loads.

    in_proj becomes in_proj_z, in_proj_xbc and in_proj_dt. GGUF files store some with a dimension more than they have.
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0] == "blk" and parts[2:] in (["ssm_a"], ["ssm_d"]):
            found[f"model.layers.{parts[1]}.{mixer}.{parts[2][-1].upper()}"] = _flat(tensor)
            continue
        prefix, _, last = name.partition(f".{mixer}.")
        match last:
            case "in_proj.weight" | "in_proj.bias" if config.recurrent:
                found |= _input_parts(f"{prefix}.{mixer}.in_proj", last.rpartition(".")[2], tensor, config)
            case "conv1d.weight":
                found[name] = conv_tensor(tensor)
            case "dt.bias":
                found[f"{prefix}.{mixer}.dt_bias"] = tensor
            case "norm.weight":
                found[name] = _flat(tensor)
            case _:
                found[name] = tensor
    return found


def _input_parts(stem: str, kind: str, tensor: TensorSource, config: ModelConfig) -> Tensors:
    layer = config.recurrent[0]
    ends = np.cumsum([0, layer.heads * layer.columns, layer.channels, layer.heads])
    if tensor.shape[0] != ends[-1]:
        raise CheckpointError(f"tensor {tensor.name} must have {ends[-1]} rows, but has {tensor.shape[0]}")
    return {
        f"{stem}_{part}.{kind}": tensor.select_rows(np.arange(ends[at], ends[at + 1]))
        for at, part in enumerate(("z", "xbc", "dt"))
    }


def _flat(tensor: TensorSource) -> TensorSource:
    if not isinstance(tensor, StoredTensor) or len(tensor.shape) == 1:
        return tensor
    return replace(tensor, shape=(math.prod(tensor.shape),), data=tensor.data.reshape(-1))


def time_step_limits(raw: dict[str, Any]) -> tuple[float, float]:
    """The least and the most that a time step may be, of config.json. Raises CheckpointError for other than two."""
    given = raw.get("time_step_limit") or (0.0, math.inf)
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        raise CheckpointError(f"config.json: time_step_limit must be two numbers, but is {given!r}")
    # An infinite number is written as an object by transformers.
    least, most = (float(limit["__float__"]) if isinstance(limit, dict) else float(limit) for limit in given)
    if math.isnan(least) or math.isnan(most) or least > most:
        raise CheckpointError(f"config.json: time_step_limit must be two numbers in order, but is {given!r}")
    return least, most


def mamba_state(shape: Mamba2Shape, *, kernel: int, heads: int, rows: int, inner: int) -> RecurrentLayer:
    """The state of a mixer whose heads have `inner` columns in all. Raises CheckpointError where they do not."""
    if shape.groups < 1 or heads < 1 or inner % heads or heads % shape.groups:
        raise CheckpointError(
            f"a Mamba-2 mixer of width {inner} has {heads} heads in {shape.groups} groups, but must have a multiple of "
            f"the groups, and a width that is one of the heads"
        )
    return RecurrentLayer(inner + 2 * shape.groups * rows, kernel, heads, rows, inner // heads)
