"""Experts that a safetensors file has as MXFP4, `_blocks` and `_scales` of one tensor for all (gpt-oss).

A block is 32 inputs, two E2M1 to a byte, the lower half first; its scale is a power of two. A block of GGUF's MXFP4 is
the scale, then 16 bytes of which the lower halves are the first 16 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmserve.model.errors import CheckpointError
from lmserve.model.expert_tensors import StackedTensor, stack
from lmserve.model.tensors import F32, StoredTensor, TensorSource

BLOCK = 32


@dataclass(frozen=True, slots=True)
class Mxfp4Tensor:
    """A `TensorSource` [rows, columns] of GGUF's type, of blocks [rows, groups, 16] and scales [rows, groups]."""

    name: str
    blocks: NDArray[np.uint8]
    scales: NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        rows, groups = self.scales.shape
        return rows, groups * BLOCK

    @property
    def dtype(self) -> str:
        return "MXFP4"

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.scales.nbytes

    @property
    def data(self) -> NDArray[Any]:
        return self.blocks

    def raw(self) -> NDArray[np.uint8]:
        halves = np.stack((self.blocks & 0xF, self.blocks >> 4), axis=-1).reshape(*self.scales.shape, BLOCK)
        packed = halves[..., : BLOCK // 2] | halves[..., BLOCK // 2 :] << 4
        return np.concatenate((self.scales[..., None], packed), axis=-1).reshape(len(self.scales), -1)

    def dequantize(self) -> F32:
        return StoredTensor(self.name, self.shape, self.dtype, self.raw()).dequantize()

    def select_rows(self, rows: NDArray[np.int64]) -> Mxfp4Tensor:
        return replace(self, blocks=self.blocks[rows], scales=self.scales[rows])


def with_mxfp4_experts(tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The tensors with gate_proj, up_proj and down_proj in place of `gate_up_proj_blocks` and the like.

    Gates and ups take turns. Raises CheckpointError for shapes that do not fit each other.
    """
    found: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        if name.endswith("_scales"):
            continue
        if not name.endswith("_blocks"):
            found[name] = tensor
            continue
        stem = name.removesuffix("_blocks")
        scales = tensors.get(f"{stem}_scales")
        if scales is None or len(tensor.shape) != 4 or tensor.shape != (*scales.shape, BLOCK // 2):
            there = "there are none" if scales is None else f"their shape is {list(scales.shape)}"
            raise CheckpointError(f"tensor {name} of shape {list(tensor.shape)} needs scales, but {there}")
        prefix, _, part = stem.rpartition(".")
        if part == "gate_up_proj":
            for at, own in enumerate(("gate_proj", "up_proj")):
                found[f"{prefix}.{own}.weight"] = _rows(f"{prefix}.{own}", tensor, scales, slice(at, None, 2))
        else:
            found[f"{stem}.weight"] = _rows(stem, tensor, scales, slice(None))
    return found


def _rows(name: str, blocks: TensorSource, scales: TensorSource, rows: slice) -> StackedTensor:
    pairs = zip(blocks.raw(), scales.raw(), strict=True)
    return stack(name, [Mxfp4Tensor(name, own[rows], exponents[rows]) for own, exponents in pairs])
