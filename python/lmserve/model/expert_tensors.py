"""The weights of a layer's experts as they are stored: one tensor for all, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmserve.model.tensors import F32, StoredTensor, TensorSource


@dataclass(frozen=True, slots=True)
class StackedTensor:
    """A `TensorSource` [n, ...] of n sources of one shape, as a rule one for each expert."""

    name: str
    parts: tuple[TensorSource, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> str:
        """That of all parts; F32 where they differ."""
        dtypes = {part.dtype for part in self.parts}
        return dtypes.pop() if len(dtypes) == 1 else "F32"

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def data(self) -> NDArray[Any]:
        return max(self.parts, key=lambda part: part.nbytes).data

    def raw(self) -> NDArray[Any]:
        if len({part.dtype for part in self.parts}) > 1:
            return self.dequantize()
        return np.stack([part.raw() for part in self.parts])

    def dequantize(self) -> F32:
        values: F32 = np.stack([part.dequantize() for part in self.parts])
        return values

    def select_rows(self, rows: NDArray[np.int64]) -> StackedTensor:
        return replace(self, parts=tuple(self.parts[row] for row in rows))


def split(source: TensorSource) -> Sequence[TensorSource]:
    """The sources of the single experts of a tensor [experts, ...]; nothing is read or copied."""
    if isinstance(source, StackedTensor):
        return source.parts
    if not isinstance(source, StoredTensor) or source.order is not None:
        raise TypeError(f"{source.name} is not stored by experts")
    # A quantized tensor's data are its rows of blocks, whatever their number of dimensions.
    each = source.data.reshape(source.shape[0], -1, *source.data.shape[-1:])
    if len(source.shape) == 2:
        each = source.data
    return [
        StoredTensor(f"{source.name}[{index}]", source.shape[1:], source.dtype, data) for index, data in enumerate(each)
    ]


def stack(name: str, parts: Sequence[TensorSource]) -> StackedTensor:
    """One source of those of all experts, in their order."""
    return StackedTensor(name, tuple(parts))


def rows_of(source: TensorSource, rows: slice, *, transposed: bool = False) -> StackedTensor:
    """Of each expert of a tensor [experts, rows, columns] (or [experts, columns, rows], `transposed`), some rows."""
    parts = []
    for part in split(source):
        if not isinstance(part, StoredTensor):
            raise TypeError(f"{source.name} is not stored by rows")
        data = part.data.T if transposed else part.data
        chosen = data[rows]
        shape = (len(chosen), *(part.shape[::-1] if transposed else part.shape)[1:])
        parts.append(StoredTensor(part.name, shape, part.dtype, chosen))
    return stack(source.name, parts)


@dataclass(frozen=True, slots=True)
class ExpertSources:
    """Weights gate and up [experts, inner, hidden] and down [experts, hidden, inner]; biases [experts, out] of all."""

    gate: TensorSource
    up: TensorSource
    down: TensorSource
    biases: tuple[TensorSource, TensorSource, TensorSource] | None = None
