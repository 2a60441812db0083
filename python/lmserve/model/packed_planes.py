"""Blocks of GGUF files into the planes of `packed_formats`, by torch, on the device that keeps them.

Layouts: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lmserve.model.packed_formats import CHUNK, PackedFormat

# Weights that are taken apart at a time: each takes several bytes then.
AT_ONCE: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Planes:
    """A matrix [rows, inputs]; see `packed_formats`. What a format does not have is None."""

    low: Tensor  # uint8 [rows, inputs * low / 8]: within a chunk, byte i has the weights i, i + 4 * low, ...
    high: Tensor | None  # int32 [rows, inputs * high / 32], lowest bits first
    scales: Tensor  # [rows, groups]: uint8, int8 or a float type
    mins: Tensor | None  # as scales
    factors: Tensor | None  # fp16 [rows, inputs / SUPER, 1 or 2]: of scales, and of mins

    @property
    def nbytes(self) -> int:
        """Memory of all planes."""
        every = (self.low, self.high, self.scales, self.mins, self.factors)
        return sum(plane.nbytes for plane in every if plane is not None)


@dataclass(frozen=True, slots=True)
class Numbers:
    """What n blocks hold: q uint8 [n, weights], scales and mins [n, groups], factors [n, 1 or 2]."""

    q: Tensor
    scales: Tensor
    mins: Tensor | None = None
    factors: Tensor | None = None


def planes(dtype: str, form: PackedFormat, blocks: Tensor, inputs: int) -> Planes:
    """The planes of a matrix with these blocks, uint8 [rows, bytes of a row]."""
    rows = max(1, AT_ONCE // inputs)
    parts = zip(*(_planes(dtype, form, part, inputs) for part in torch.split(blocks, rows)), strict=True)
    low, high, scales, mins, factors = (_joined(part) for part in parts)
    assert low is not None
    assert scales is not None
    return Planes(low, high, scales, mins, factors)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def _planes(dtype: str, form: PackedFormat, blocks: Tensor, inputs: int) -> tuple[Tensor | None, ...]:
    rows = len(blocks)
    numbers = READERS[dtype](blocks.reshape(rows * (inputs // form.block), -1))
    q = numbers.q.view(rows, inputs)

    def by_row(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(rows, -1).contiguous()

    factors = numbers.factors
    return (
        low_plane(q, form.low),
        high_plane(q >> form.low, form.high) if form.high else None,
        by_row(numbers.scales),
        by_row(numbers.mins),
        None if factors is None else factors.reshape(rows, -1, factors.shape[-1]).contiguous(),
    )


def low_plane(q: Tensor, bits: int) -> Tensor:
    """The low bits of q [rows, inputs]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=q.device)
    chunks = (q & (2**bits - 1)).view(len(q), -1, len(shifts), CHUNK // len(shifts))
    plane: Tensor = (chunks << shifts[:, None]).sum(2, dtype=torch.uint8)
    return plane.view(len(q), -1)


def high_plane(q: Tensor, bits: int) -> Tensor:
    """These many bits of q [rows, inputs], in words."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=q.device)
    parts = (q & (2**bits - 1)).view(len(q), -1, len(shifts))
    plane: Tensor = (parts << shifts).sum(2, dtype=torch.uint8)
    return plane.view(torch.int32)


def _bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """[..., count, bytes] of packed [..., bytes]: the numbers of each byte, lowest bits first."""
    shifts = torch.arange(0, bits * count, bits, dtype=torch.uint8, device=packed.device)
    numbers: Tensor = packed[..., None, :] >> shifts[:, None] & (2**bits - 1)
    return numbers


def _half(blocks: Tensor, first: int, count: int = 1) -> Tensor:
    return blocks[:, first : first + 2 * count].contiguous().view(torch.float16)


def _q8_0(blocks: Tensor) -> Numbers:
    return Numbers(blocks[:, 2:] ^ 0x80, _half(blocks, 0))


def _nibbles(blocks: Tensor) -> Tensor:
    """Of 32 weights in 16 bytes, the first half in the low bits."""
    return _bits(blocks, 4, 2).flatten(1)


def _fifth(blocks: Tensor) -> Tensor:
    """Bit 4 of 32 weights, of four bytes."""
    return _bits(blocks[:, :, None], 1, 8).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Numbers:
    return Numbers(_nibbles(blocks[:, 2:]), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Numbers:
    return Numbers(_nibbles(blocks[:, 4:]), _half(blocks, 0), -_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Numbers:
    return Numbers(_nibbles(blocks[:, 6:]) | _fifth(blocks[:, 2:6]), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Numbers:
    return Numbers(_nibbles(blocks[:, 8:]) | _fifth(blocks[:, 4:8]), _half(blocks, 0), -_half(blocks, 2))


def _q2_k(blocks: Tensor) -> Numbers:
    q = _bits(blocks[:, 16:80].view(-1, 2, 32), 2, 4).flatten(1)
    return Numbers(q, blocks[:, :16] & 15, blocks[:, :16] >> 4, _half(blocks, 80, 2))


def _q3_k(blocks: Tensor) -> Numbers:
    q = _bits(blocks[:, 32:96].reshape(-1, 2, 32), 2, 4).flatten(1) | _bits(blocks[:, :32], 1, 8).flatten(1) << 2
    scales = _bits(blocks[:, 96:104], 4, 2).flatten(1) | _bits(blocks[:, 104:108], 2, 4).flatten(1) << 4
    return Numbers(q, scales.to(torch.int8) - 32, None, _half(blocks, 108))


def _scales_k(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight mins of six bits, of twelve bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    return scales, torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)


def _q4_k(blocks: Tensor) -> Numbers:
    q = _bits(blocks[:, 16:].view(-1, 4, 32), 4, 2).flatten(1)
    return Numbers(q, *_scales_k(blocks[:, 4:16]), _half(blocks, 0, 2))


def _q5_k(blocks: Tensor) -> Numbers:
    q = _bits(blocks[:, 48:].view(-1, 4, 32), 4, 2).flatten(1) | _bits(blocks[:, 16:48], 1, 8).flatten(1) << 4
    return Numbers(q, *_scales_k(blocks[:, 4:16]), _half(blocks, 0, 2))


def _q6_k(blocks: Tensor) -> Numbers:
    low = _bits(blocks[:, :128].reshape(-1, 2, 64), 4, 2).flatten(1)
    q = low | _bits(blocks[:, 128:192].reshape(-1, 2, 32), 2, 4).flatten(1) << 4
    return Numbers(q, blocks[:, 192:208].contiguous().view(torch.int8), None, _half(blocks, 208))


def _iq4_xs(blocks: Tensor) -> Numbers:
    high = _bits(blocks[:, 2:4, None], 2, 4).flatten(1)
    scales = _bits(blocks[:, 4:8, None], 4, 2).flatten(1) | high << 4
    q = _bits(blocks[:, 8:].view(-1, 8, 16), 4, 2).flatten(1)
    return Numbers(q, scales.to(torch.int8) - 32, None, _half(blocks, 0))


def _mxfp4(blocks: Tensor) -> Numbers:
    return Numbers(_nibbles(blocks[:, 1:]), blocks[:, :1])


READERS: Final[dict[str, Callable[[Tensor], Numbers]]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _q4_0,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
