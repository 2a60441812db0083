"""A Triton kernel that multiplies with packed weights. The only module that imports triton.

The kernel makes floats of a tile of weights and multiplies it by `tl.dot`. Few rows of activations are memory-bound:
then SPLIT programs share the inputs of a tile of outputs, and the sums are added in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmserve.model.packed_formats import CHUNK, SUPER, PackedFormat
from lmserve.model.packed_planes import Planes

# Programs for each multiprocessor that hide the latency of memory.
PROGRAMS = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program computes: so many outputs of so many rows, by steps of so many chunks of inputs."""

    rows: int
    outputs: int
    chunks: int
    warps: int


# Guesses: no GPU has run them yet.
TILES = (
    Tile(rows=16, outputs=64, chunks=4, warps=4),
    Tile(rows=64, outputs=64, chunks=4, warps=4),
    Tile(rows=128, outputs=128, chunks=2, warps=8),
)
# The interpreter takes as long for a small tile as for a large one.
INTERPRETED = Tile(rows=64, outputs=512, chunks=8, warps=4)


def tile_of(rows: int, device: torch.device) -> Tile:
    """The smallest tile that has all rows, or the largest."""
    own = tiles(device)
    return next((tile for tile in own if rows <= tile.rows), own[-1])


def tiles(device: torch.device) -> tuple[Tile, ...]:
    """The tiles that products on this device have."""
    return (INTERPRETED,) if device.type == "cpu" else TILES


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def packed_matmul(
    x: tl.tensor,
    out: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    factors: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    factor: tl.tensor,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    MINS: tl.constexpr,
    FACTORS: tl.constexpr,
    SUPER: tl.constexpr,
    E8M0: tl.constexpr,
    TABLED: tl.constexpr,
    TABLE0: tl.constexpr,
    TABLE1: tl.constexpr,
    TABLE2: tl.constexpr,
    TABLE3: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """out [SPLIT, rows, outputs] = factor * x [rows, inputs] @ weights.T, each of SPLIT with some of the inputs."""
    BYTES: tl.constexpr = 4 * LOW  # of a chunk
    PARTS: tl.constexpr = 8 // LOW
    n = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    m = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.program_id(2)
    byte = tl.arange(0, BYTES)
    column = tl.arange(0, CHUNKS * BYTES)
    steps = tl.cdiv(inputs // 32, CHUNKS)
    each = tl.cdiv(steps, SPLIT)
    groups = inputs // GROUP
    supers = inputs // SUPER
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for step in range(k * each, min(k * each + each, steps)):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        there = (n < outputs)[:, None] & (chunk * 32 < inputs)[None, :]
        at = n[:, None, None] * (inputs // 8 * LOW) + (chunk * BYTES)[None, :, None] + byte[None, None, :]
        packed = tl.load(low + at, mask=there[:, :, None], other=0).to(tl.int32)
        if FACTORS:
            whole = (n * supers)[:, None] + (chunk * 32 // SUPER)[None, :]
            if MINS:
                whole = whole * 2
                min_factor = tl.load(factors + whole + 1, mask=there, other=0.0).to(tl.float32)
            scale_factor = tl.load(factors + whole, mask=there, other=0.0).to(tl.float32)
        for part in tl.static_range(PARTS):
            group = (n * groups)[:, None] + ((chunk * 32 + part * BYTES) // GROUP)[None, :]
            scale = tl.load(scales + group, mask=there, other=0)
            scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True) if E8M0 else scale.to(tl.float32)
            if FACTORS:
                scale = scale * scale_factor
            q = (packed >> (part * LOW)) & ((1 << LOW) - 1)
            if HIGH:
                word = (n * (inputs // 32 * HIGH))[:, None] + (chunk * HIGH + part * BYTES * HIGH // 32)[None, :]
                bits = tl.load(high + word, mask=there, other=0)[:, :, None]
                bits = bits >> (part * BYTES * HIGH % 32 + byte * HIGH)[None, None, :]
                q = q | ((bits & ((1 << HIGH) - 1)) << LOW)
            if TABLED:
                four = tl.where(q < 8, tl.where(q < 4, TABLE0, TABLE1), tl.where(q < 12, TABLE2, TABLE3))
                q = (four << (24 - 8 * (q & 3))) >> 24
            weight = (q - ZERO).to(tl.float32) * scale[:, :, None]
            if MINS:
                least = tl.load(mins + group, mask=there, other=0).to(tl.float32)
                if FACTORS:
                    least = least * min_factor
                weight = weight - least[:, :, None]
            weights = tl.reshape(weight.to(x.dtype.element_ty), (OUTPUTS, CHUNKS * BYTES))
            i = step * CHUNKS * 32 + column // BYTES * 32 + part * BYTES + column % BYTES
            known = (i < inputs)[:, None] & (m < rows)[None, :]
            activations = tl.load(x + i[:, None] + (m * x_stride)[None, :], mask=known, other=0.0)
            total = tl.dot(weights, activations, total, input_precision="ieee")
    target = out + (k * rows + m)[None, :] * out_stride + n[:, None]
    tl.store(target, (total * factor).to(out.dtype.element_ty), mask=(n < outputs)[:, None] & (m < rows)[None, :])


def constants(form: PackedFormat) -> dict[str, Any]:
    """The arguments of the kernel that say what a format is like."""
    table = [0, 0, 0, 0]
    if form.table is not None:
        for index, entry in enumerate(form.table):
            table[index // 4] |= (entry & 255) << (index % 4 * 8)
    words = [word - (1 << 32) if word >> 31 else word for word in table]
    return {
        "LOW": form.low,
        "HIGH": form.high,
        "GROUP": form.group,
        "ZERO": form.zero,
        "MINS": form.mins,
        "FACTORS": form.factors,
        "SUPER": SUPER,
        "E8M0": form.scale == "e8m0",
        "TABLED": form.table is not None,
        **{f"TABLE{index}": word for index, word in enumerate(words)},
    }


def split_of(tile: Tile, rows: int, outputs: int, inputs: int, processors: int) -> int:
    """How many programs share the inputs of a tile of outputs, so that all multiprocessors have some."""
    programs = -(-rows // tile.rows) * -(-outputs // tile.outputs)
    steps = -(-inputs // (CHUNK * tile.chunks))
    wanted = PROGRAMS * processors // programs
    # A power of two: each number is a kernel of its own.
    return 1 << (max(1, min(wanted, steps // 4)).bit_length() - 1)


def multiply(
    x: Tensor, out: Tensor, form: PackedFormat, weights: Planes, *, inputs: int, factor: float, split: int, tile: Tile
) -> None:
    """Write factor * x [rows, inputs] @ weights.T to out [rows, outputs], whose rows may lie apart."""
    rows, outputs = out.shape
    sums = out if split == 1 else torch.empty((split, rows, outputs), dtype=torch.float32, device=x.device)
    none = weights.low
    grid = (-(-outputs // tile.outputs), -(-rows // tile.rows), split)
    packed_matmul[grid](
        x,
        sums,
        weights.low,
        none if weights.high is None else weights.high,
        weights.scales,
        none if weights.mins is None else weights.mins,
        none if weights.factors is None else weights.factors,
        rows,
        outputs,
        inputs,
        x.stride(0),
        sums.stride(-2),
        factor * form.unit,
        **constants(form),
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        CHUNKS=tile.chunks,
        SPLIT=split,
        num_warps=tile.warps,
    )
    if split > 1:
        out.copy_(sums.sum(0))
