"""Whether the kernels of packed weights work on this device, asked before the weights are loaded.

Triton compiles for the device that it finds, with the C compiler that it finds: what was tested elsewhere may fail.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

from lmserve.model import packed_kernel
from lmserve.model.packed_formats import SUPER, PackedFormat
from lmserve.model.packed_planes import Planes
from lmserve.model.torch_packed import PackedMatrix

OUTPUTS, INPUTS, SPLIT = 96, 2 * SUPER, 2
# Of the largest output: rounding of activations in bf16 to be far below, a wrong weight far above.
TOLERANCE: Final = 0.02


def fault(formats: Collection[PackedFormat], device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels of these formats, or None. Compiles all of them, which takes seconds each."""
    for form in formats:
        matrix = PackedMatrix(form, random_planes(form, OUTPUTS, INPUTS, device), INPUTS)
        weights = matrix.rows(torch.arange(OUTPUTS, device=device), torch.float32)
        for tile in packed_kernel.tiles(device):
            x = torch.rand((tile.rows - 1, INPUTS), device=device).sub_(0.5).to(dtype)
            expected = x.float() @ weights.T
            for split in (1, SPLIT):
                out = torch.full((len(x), OUTPUTS), torch.nan, dtype=dtype, device=device)
                try:
                    matrix.multiply(x, out, tile=tile, split=split)
                    error = ((out.float() - expected).abs().max() / expected.abs().max()).item()
                # Triton raises errors of many kinds, and so do the compilers that it runs.
                except Exception as failure:  # noqa: BLE001
                    return f"{type(failure).__name__}: {failure}"
                if not error < TOLERANCE:
                    return f"a product of {form} is off by {error:.3g} of its largest number"
    return None


def random_planes(form: PackedFormat, outputs: int, inputs: int, device: torch.device) -> Planes:
    """Planes of random numbers whose scales are near 1."""
    generator = torch.Generator().manual_seed(0)

    def numbers(size: int, most: int = 256) -> Tensor:
        return torch.randint(0, most, (outputs, size), dtype=torch.uint8, generator=generator).to(device)

    def scales() -> Tensor:
        groups = inputs // form.group
        if form.scale == "e8m0":
            return numbers(groups, 4) + 125
        return numbers(groups, 64) if form.factors else numbers(groups, 64).to(torch.float16) / 64

    low = numbers(inputs * form.low // 8)
    high = numbers(inputs * form.high // 8).view(torch.int32) if form.high else None
    factors = numbers(inputs // SUPER * (1 + form.mins), 64).to(torch.float16) / 1024 if form.factors else None
    own = None if factors is None else factors.view(outputs, -1, 1 + form.mins)
    return Planes(low, high, scales(), scales() if form.mins else None, own)
