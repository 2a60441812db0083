"""GGUF's types of one to three bits as blocks that the kernels know: the same numbers in more memory.

In all of them, 256 weights share a factor in half precision, and 16 or 32 of them an integer scale. What an index
stands for is a small integer (of IQ1 and IQ2, eight times it is one). Those of IQ1 and IQ3 become blocks of Q6_K. Those
of IQ2 are 8, 25 and 43 with a sign, and become blocks of `IQ2`, a type of `src/cpu/quant/gguf.rs`: 256 indices of four
bits into a table, 16 scales, and the factor. Layouts: ggml-common.h of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmserve.model.tensors import REPACKED_TYPES, TensorSource

SUPER, GROUP = 256, 16
# Blocks that are taken apart at a time: as floats they take much more memory.
AT_ONCE = 1 << 14
# What the half-precision factor is divided by.
DIVISORS = {"IQ3_XXS": 2, "IQ3_S": 1, "IQ1_S": 8, "IQ1_M": 8, "IQ2_XXS": 8, "IQ2_XS": 8, "IQ2_S": 8}
# The integers of IQ2 in the order of their indices.
MAGNITUDES = np.array([-43, -25, -8, 8, 25, 43], np.float32)


def repacked(source: TensorSource) -> NDArray[np.uint8] | None:
    """The blocks of a matrix as those of REPACKED_TYPES; None if half precision cannot represent its factors.

    Any matrix of a real model has factors that do: only those below 2^-11 may lose a bit.
    """
    # Imported late, as in `StoredTensor.dequantize`.
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[source.dtype]
    raw = source.raw()
    blocks = np.ascontiguousarray(raw).reshape(-1, raw.shape[-1] // (source.shape[-1] // SUPER))
    fill = _indices if REPACKED_TYPES[source.dtype] == "IQ2" else _six_bits
    packed = np.empty((len(blocks), 146 if fill is _indices else 210), np.uint8)
    for first in range(0, len(blocks), AT_ONCE):
        some = blocks[first : first + AT_ONCE]
        whole, scales = _scales(source.dtype, some)
        factors = whole / np.float16(DIVISORS[source.dtype])
        if (factors.astype(np.float32) * DIVISORS[source.dtype] != whole.astype(np.float32)).any():
            return None
        units = factors.astype(np.float32)[:, None] * scales
        values = dequantize(some, kind).reshape(len(some), -1, GROUP)
        # Where the factor is 0, so are all values.
        steps = np.divide(values, units[:, :, None], out=np.zeros_like(values), where=units[:, :, None] != 0)
        target = packed[first : first + AT_ONCE]
        fill(target, np.rint(steps))
        target[:, -18:-2] = scales
        target[:, -2:] = factors[:, None].view(np.uint8)
    return packed


def _six_bits(blocks: NDArray[np.uint8], steps: NDArray[np.float32]) -> None:
    """Write steps from -32 to 31 as Q6_K has them."""
    q = (steps + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    blocks[:, :128] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    blocks[:, 128:192] = np.bitwise_or.reduce(high << shifts, axis=2).reshape(-1, 64)


def _indices(blocks: NDArray[np.uint8], steps: NDArray[np.float32]) -> None:
    """Write MAGNITUDES as their indices, the first 16 of 32 in the low halves of bytes."""
    q = np.searchsorted(MAGNITUDES, steps).astype(np.uint8).reshape(-1, 8, 2, 16)
    blocks[:, :128] = (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)


def _scales(kind: str, blocks: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """The half-precision factor of each block [n], and the integer scales of its sixteenths [n, 16]."""
    count = len(blocks)
    if kind == "IQ1_M":
        words = np.ascontiguousarray(blocks[:, 48:]).view(np.uint16)
        parts = words >> 12 << np.array([0, 4, 8, 12], np.uint16)
        factors = np.bitwise_or.reduce(parts, axis=1).astype(np.uint16).view(np.float16)
        return factors, _odd(words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & 7, count, 1)
    factors = np.ascontiguousarray(blocks[:, :2]).view(np.float16)[:, 0]
    if kind == "IQ1_S":
        words = np.ascontiguousarray(blocks[:, 34:]).view(np.uint16)
        return factors, _odd(words >> 12 & 7, count, 2)
    if kind in ("IQ2_XS", "IQ2_S"):
        return factors, _odd(blocks[:, -8:, None] >> np.array([0, 4], np.uint8) & 15, count, 1)
    if kind == "IQ3_S":
        return factors, _odd(blocks[:, 106:, None] >> np.array([0, 4], np.uint8) & 15, count, 2)
    words32 = np.ascontiguousarray(blocks[:, 2:] if kind == "IQ2_XXS" else blocks[:, 66:]).view(np.uint32)
    return factors, _odd((words32[:, 1::2] if kind == "IQ2_XXS" else words32) >> 28, count, 2)


def _odd(scales: NDArray[np.integer[Any]], count: int, repeated: int) -> NDArray[np.uint8]:
    """What scales stand for: the odd numbers; each of them for `repeated` groups."""
    return np.repeat((2 * scales + 1).astype(np.uint8).reshape(count, -1), repeated, axis=1)
