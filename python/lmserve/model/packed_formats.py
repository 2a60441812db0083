"""How weights lie on a GPU that stay packed there: the same numbers as in the file, in planes. Without torch.

A weight is `(q - zero) * scale - min`, or `table[q] * scale`. The low bits of q, its high bits, the scales and the mins
are planes of their own, each with a row for each output. So one kernel reads all types, with loads that are aligned,
which blocks of 18, 34 or 210 bytes are not. Scales of six bits take eight, the rest takes what it takes in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from lmserve.model.tensors import ScaledTensor, TensorSource

CHUNK: Final = 32  # inputs whose low bits lie together
SUPER: Final = 256  # inputs that share the factors of integer scales and mins
FACTOR_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """Planes of one type of weights."""

    low: int  # bits: 2, 4 or 8
    group: int  # inputs that share a scale
    scale_bytes: int
    high: int = 0  # bits: 0, 1 or 2
    zero: int = 0
    mins: bool = False
    factors: bool = False  # scales and mins are integers, times a factor in fp16 for each SUPER inputs
    table: tuple[int, ...] | None = None  # what the 16 values of q stand for
    scale: Literal["number", "e8m0"] = "number"
    unit: float = 1.0  # of the entries of the table
    block: int = SUPER  # inputs that a row has a multiple of

    def nbytes(self, rows: int, inputs: int) -> int:
        """Memory of a matrix [rows, inputs]."""
        kinds = 1 + self.mins
        a_row = inputs * (self.low + self.high) // 8 + inputs // self.group * self.scale_bytes * kinds
        return rows * (a_row + inputs // SUPER * FACTOR_BYTES * kinds * self.factors)


# ggml-common.h of https://github.com/ggml-org/ggml has both tables; E2M1 are doubled to be integers.
IQ4: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

FORMATS: Final = {
    "Q8_0": PackedFormat(low=8, group=32, scale_bytes=2, zero=128, block=32),
    "Q4_0": PackedFormat(low=4, group=32, scale_bytes=2, zero=8, block=32),
    "Q4_1": PackedFormat(low=4, group=32, scale_bytes=2, mins=True, block=32),
    "Q5_0": PackedFormat(low=4, high=1, group=32, scale_bytes=2, zero=16, block=32),
    "Q5_1": PackedFormat(low=4, high=1, group=32, scale_bytes=2, mins=True, block=32),
    "Q2_K": PackedFormat(low=2, group=16, scale_bytes=1, mins=True, factors=True),
    "Q3_K": PackedFormat(low=2, high=1, group=16, scale_bytes=1, zero=4, factors=True),
    "Q4_K": PackedFormat(low=4, group=32, scale_bytes=1, mins=True, factors=True),
    "Q5_K": PackedFormat(low=4, high=1, group=32, scale_bytes=1, mins=True, factors=True),
    "Q6_K": PackedFormat(low=4, high=2, group=16, scale_bytes=1, zero=32, factors=True),
    "IQ4_NL": PackedFormat(low=4, group=32, scale_bytes=2, table=IQ4, block=32),
    "IQ4_XS": PackedFormat(low=4, group=32, scale_bytes=1, factors=True, table=IQ4),
    "MXFP4": PackedFormat(low=4, group=32, scale_bytes=1, table=E2M1, scale="e8m0", unit=0.5, block=32),
}


def unscaled(source: TensorSource) -> tuple[TensorSource, float]:
    """What is stored, and the factor that the source multiplies it by."""
    factor = 1.0
    while isinstance(source, ScaledTensor):
        factor *= source.factor
        source = source.source
    return source, factor


def format_of(dtype: str, shape: tuple[int, ...]) -> PackedFormat | None:
    """The format of a matrix of that type; None where it is loaded as floats."""
    found = FORMATS.get(dtype)
    return found if found is not None and len(shape) == 2 and shape[1] % found.block == 0 else None
