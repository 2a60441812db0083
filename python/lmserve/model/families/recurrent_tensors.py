"""How checkpoints store what recurrent layers load: the decay of a state, and the weights of a convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmserve.model.families.family import Tensors
from lmserve.model.tensors import F32, StoredTensor, TensorSource


@dataclass(frozen=True, slots=True)
class DecayTensor:
    """A `TensorSource` of -e^x of another's values x."""

    source: TensorSource

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def data(self) -> NDArray[Any]:
        return self.source.data

    def raw(self) -> F32:
        return self.dequantize()

    def dequantize(self) -> F32:
        decay: F32 = -np.exp(self.source.dequantize())
        return decay

    def select_rows(self, rows: NDArray[np.int64]) -> DecayTensor:
        return replace(self, source=self.source.select_rows(rows))


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
