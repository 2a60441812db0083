"""A weight as stored in a checkpoint: shape, storage type, and bytes, which are read only when they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

PLAIN_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
# Blocks of GGUF files that the kernels of the CPU keep as they are.
PACKED_TYPES = (
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "NVFP4",
    "TQ1_0",
    "TQ2_0",
)
# Those that become blocks of another type first, which is exact. IQ2 is a type of the kernels alone.
REPACKED_TYPES = {
    "IQ2_XXS": "IQ2",
    "IQ2_XS": "IQ2",
    "IQ2_S": "IQ2",
    "IQ3_XXS": "Q6_K",
    "IQ3_S": "Q6_K",
    "IQ1_S": "Q6_K",
    "IQ1_M": "Q6_K",
}
QUANTIZED_TYPES = PACKED_TYPES + tuple(REPACKED_TYPES)


class TensorSource(Protocol):
    """One stored tensor. Row-major; linear weights are [out_features, in_features]."""

    @property
    def name(self) -> str:
        """Name in the file, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, in elements."""

    @property
    def dtype(self) -> str:
        """Storage type by its GGUF name: "F32", "F16", "BF16", "Q8_0", "Q4_1", ..."""

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""

    @property
    def data(self) -> NDArray[Any]:
        """What the file has, mapped and not read, whatever rows were selected; of several parts the largest."""

    def raw(self) -> NDArray[Any]:
        """The stored values, not converted: usually a read-only view of the mapped file.

        F32: float32, F16: float16, BF16: uint16 (the bits), all of `shape`; a quantized type: uint8
        [rows, bytes_per_row] of whole GGML blocks.
        """

    def dequantize(self) -> F32:
        """The values as float32 of `shape`, newly allocated unless stored so."""

    def select_rows(self, rows: NDArray[np.int64]) -> Self:
        """The source of these rows, in this order (a quantized row is whole blocks, so nothing is requantized)."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A `TensorSource` over a mapped file. `data` is what `raw` documents, before `order` picks its rows."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: NDArray[Any]
    order: NDArray[np.int64] | None = None

    @property
    def nbytes(self) -> int:
        if self.order is None:
            return self.data.nbytes
        return self.data.nbytes // len(self.data) * len(self.order)

    def raw(self) -> NDArray[Any]:
        return self.data if self.order is None else self.data[self.order]

    def dequantize(self) -> F32:
        raw = self.raw()
        if self.dtype in ("F32", "F16"):
            return raw.astype(np.float32, copy=False)
        if self.dtype == "BF16":
            return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        # Imported late: gguf costs 0.3 s, and plain checkpoints do not need it.
        from gguf import GGMLQuantizationType, dequantize

        values: F32 = dequantize(raw, GGMLQuantizationType[self.dtype])
        return values.reshape(self.shape)

    def select_rows(self, rows: NDArray[np.int64]) -> StoredTensor:
        order = rows if self.order is None else self.order[rows]
        return replace(self, shape=(len(rows), *self.shape[1:]), order=order)


@dataclass(frozen=True, slots=True)
class DerivedTensor(ABC):
    """A `TensorSource` of values in fp32 that are computed of those of another, each row of the same row."""

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

    @abstractmethod
    def dequantize(self) -> F32: ...

    def select_rows(self, rows: NDArray[np.int64]) -> Self:
        return replace(self, source=self.source.select_rows(rows))


@dataclass(frozen=True, slots=True)
class ShiftedTensor(DerivedTensor):
    """Another's values plus `shift`."""

    shift: float

    def dequantize(self) -> F32:
        shifted: F32 = self.source.dequantize() + np.float32(self.shift)
        return shifted


@dataclass(frozen=True, slots=True)
class ScaledTensor(DerivedTensor):
    """Another's values times `factor`. `stored`: the factor is part of how a file stores the values."""

    factor: float
    stored: bool = False

    def dequantize(self) -> F32:
        scaled: F32 = self.source.dequantize() * np.float32(self.factor)
        return scaled


def constant(name: str, values: list[float]) -> StoredTensor:
    """A source of numbers that lie elsewhere than among a file's tensors."""
    return StoredTensor(name, (len(values),), "F32", np.array(values, np.float32))
