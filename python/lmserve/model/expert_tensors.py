"""The weights of a layer's experts, or of its heads, as they are stored: one tensor for all, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmserve.model.tensors import F32, PLAIN_TYPES, StoredTensor, TensorSource


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


@dataclass(frozen=True, slots=True)
class HeadsTensor:
    """A `TensorSource` [heads, rows, columns], or [heads, columns, rows] where `transposed`.

    It is of the same rows of each head of a matrix [heads * all, columns].
    """

    whole: TensorSource
    heads: int
    rows: slice
    transposed: bool = False
    order: NDArray[np.int64] | None = None

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.rows.stop - self.rows.start, self.whole.shape[1])
        heads = self.heads if self.order is None else len(self.order)
        return (heads, *(shape[::-1] if self.transposed else shape))

    @property
    def dtype(self) -> str:
        """A transposed row is no row of blocks any more."""
        return "F32" if self.transposed and self.whole.dtype not in PLAIN_TYPES else self.whole.dtype

    @property
    def nbytes(self) -> int:
        rows: int = self.shape[0] * (self.rows.stop - self.rows.start)
        return self.whole.nbytes * rows // self.whole.shape[0]

    @property
    def data(self) -> NDArray[Any]:
        return self.whole.data

    def split(self) -> list[StoredTensor]:
        """Each head's."""
        values = self.whole.raw() if self.dtype == self.whole.dtype else self.whole.dequantize()
        each = values.reshape(self.heads, -1, values.shape[-1])[:, self.rows]
        each = each if self.order is None else each[self.order]
        each = each.swapaxes(1, 2) if self.transposed else each
        return [StoredTensor(self.name, self.shape[1:], self.dtype, data) for data in each]

    def raw(self) -> NDArray[Any]:
        return np.stack([head.raw() for head in self.split()])

    def dequantize(self) -> F32:
        values: F32 = np.stack([head.dequantize() for head in self.split()])
        return values

    def select_rows(self, rows: NDArray[np.int64]) -> HeadsTensor:
        return replace(self, order=rows if self.order is None else self.order[rows])


def split(source: TensorSource) -> Sequence[TensorSource]:
    """The sources of the single experts of a tensor [experts, ...]; nothing is read or copied."""
    if isinstance(source, StackedTensor):
        return source.parts
    if isinstance(source, HeadsTensor):
        return source.split()
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
    """Weights gate and up [experts, inner, hidden] and down [experts, hidden, inner]; biases [experts, out] of all.

    gate None: the experts have none, and no biases.
    """

    gate: TensorSource | None
    up: TensorSource
    down: TensorSource
    biases: tuple[TensorSource, TensorSource, TensorSource] | None = None
