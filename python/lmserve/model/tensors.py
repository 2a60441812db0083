"""A weight as it is stored in a checkpoint: shape, storage type, and the bytes, read only when asked for."""

from __future__ import annotations

from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


class TensorSource(Protocol):
    """One stored tensor. Row-major; linear weights are [out_features, in_features]."""

    @property
    def name(self) -> str:
        """Canonical name, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, in elements."""

    @property
    def dtype(self) -> str:
        """Storage type by its GGUF name: "F32", "F16", "BF16", "Q8_0", "Q4_1", ..."""

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""

    def raw(self) -> NDArray[Any]:
        """The stored values, not converted: usually a read-only view of the mapped file.

        F32: float32, F16: float16, BF16: uint16 (the bits), all of `shape`; a quantized type: uint8 [rows,
        bytes_per_row] of whole GGML blocks.
        """

    def dequantize(self) -> F32:
        """The values as float32 of `shape`, newly allocated unless stored so."""

    def select_rows(self, rows: NDArray[np.int64]) -> Self:
        """The source of these rows, in this order (a quantized row is whole blocks, so nothing is requantized)."""
