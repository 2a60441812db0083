"""Linear layers and embeddings whose weights stay packed in the memory of the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lmserve.model.packed_formats import SUPER, PackedFormat, format_of, unscaled
from lmserve.model.packed_kernel import Tile, multiply, split_of, tile_of
from lmserve.model.packed_planes import Planes, planes
from lmserve.model.tensors import TensorSource
from lmserve.model.torch_weight import TorchWeight


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [outputs, inputs] in planes, times `factor`."""

    form: PackedFormat
    planes: Planes
    inputs: int
    factor: float = 1.0

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return len(self.planes.low)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.planes.nbytes

    def multiply(self, x: Tensor, out: Tensor, *, tile: Tile | None = None, split: int | None = None) -> None:
        """Write x [n, inputs] times the transposed matrix to out [n, outputs]. None: tile and split by the sizes."""
        tile = tile or tile_of(len(x), x.device)
        split = split or split_of(tile, len(x), self.outputs, self.inputs, processors(x.device))
        inputs, factor = self.inputs, self.factor
        multiply(x, out, self.form, self.planes, inputs=inputs, factor=factor, split=split, tile=tile)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows [n, inputs] with these numbers, as floats."""
        form, own = self.form, self.planes
        low = own.low[index].view(len(index), -1, 1, 4 * form.low)
        shifts = torch.arange(0, 8, form.low, dtype=torch.uint8, device=low.device)
        q = (low >> shifts[:, None] & (2**form.low - 1)).reshape(len(index), self.inputs)
        if own.high is not None:
            high = own.high[index].view(torch.uint8)[:, :, None]
            shifts = torch.arange(0, 8, form.high, dtype=torch.uint8, device=low.device)
            q = q | (high >> shifts & (2**form.high - 1)).view(len(index), -1) << form.low
        if form.table is None:
            values = q.float() - form.zero
        else:
            values = torch.tensor(form.table, dtype=torch.float32, device=low.device)[q.long()] * form.unit
        scales, mins = own.scales[index], None if own.mins is None else own.mins[index].float()
        scales = (scales.int() << 23).view(torch.float32) if form.scale == "e8m0" else scales.float()
        if own.factors is not None:
            factors = own.factors[index].float().repeat_interleave(SUPER // form.group, dim=1)
            scales = scales * factors[..., 0]
            mins = None if mins is None else mins * factors[..., 1]
        groups = values.view(len(index), -1, form.group) * scales[..., None]
        if mins is not None:
            groups = groups - mins[..., None]
        rows: Tensor = groups.view(len(index), self.inputs) * self.factor
        return rows.to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight(TorchWeight):
    """A linear layer whose outputs are those of `matrices`, one after the other; or an embedding, of one matrix.

    Those of a type that has no format are floats. `weight` is empty.
    """

    matrices: tuple[PackedMatrix | Tensor, ...]

    def linear(self, x: Tensor) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        widths = [part.outputs if isinstance(part, PackedMatrix) else len(part) for part in self.matrices]
        out = torch.empty((len(x), sum(widths)), dtype=x.dtype, device=x.device)
        if len(x):
            for part, target in zip(self.matrices, torch.split(out, widths, dim=1), strict=True):
                if isinstance(part, PackedMatrix):
                    part.multiply(x, target)
                else:
                    target.copy_(functional.linear(x, part))
        return out if self.bias is None else out.add_(self.bias)

    def rows(self, index: Tensor) -> Tensor:
        (part,) = self.matrices
        return part.rows(index, self.weight.dtype) if isinstance(part, PackedMatrix) else part[index]

    @property
    def packed_bytes(self) -> int:
        """Memory of the matrices that are packed."""
        return sum(part.nbytes for part in self.matrices if isinstance(part, PackedMatrix))


def load(
    sources: Sequence[TensorSource],
    bias: Tensor | None,
    plain: Callable[[TensorSource], Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> PackedWeight | None:
    """Matrices side by side on the device; None where no type of theirs has a format. `plain` loads those of others.

    dtype: of the rows that are looked up.
    """
    matrices = [pack(source, device) for source in sources]
    if not any(matrices):
        return None
    pairs = zip(sources, matrices, strict=True)
    parts = together([plain(source) if matrix is None else matrix for source, matrix in pairs])
    return PackedWeight(torch.empty(0, device=device, dtype=dtype), bias, matrices=parts)


def pack(source: TensorSource, device: torch.device) -> PackedMatrix | None:
    """The matrix on the device; None where its type has no format."""
    source, factor = unscaled(source)
    form = format_of(source.dtype, source.shape)
    if form is None:
        return None
    rows, inputs = source.shape
    # A copy: torch takes no read-only array.
    blocks = torch.from_numpy(np.array(source.raw(), copy=True).reshape(rows, -1)).to(device)
    return PackedMatrix(form, planes(source.dtype, form, blocks, inputs), inputs, factor)


def together(matrices: Sequence[PackedMatrix | Tensor]) -> tuple[PackedMatrix | Tensor, ...]:
    """Those that follow each other in one format as one: a kernel is launched for each."""
    joined: list[PackedMatrix | Tensor] = []
    for matrix in matrices:
        last = joined[-1] if joined else None
        if isinstance(last, PackedMatrix) and isinstance(matrix, PackedMatrix) and _alike(last, matrix):
            joined[-1] = PackedMatrix(last.form, _stacked(last.planes, matrix.planes), last.inputs, last.factor)
        else:
            joined.append(matrix)
    return tuple(joined)


def _alike(one: PackedMatrix, other: PackedMatrix) -> bool:
    return one.form == other.form and math.isclose(one.factor, other.factor, rel_tol=0)


def _stacked(one: Planes, other: Planes) -> Planes:
    def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None or second is None else torch.cat((first, second))

    low, scales = torch.cat((one.low, other.low)), torch.cat((one.scales, other.scales))
    return Planes(low, both(one.high, other.high), scales, both(one.mins, other.mins), both(one.factors, other.factors))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 on the CPU, where Triton interprets."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
