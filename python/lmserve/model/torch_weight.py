"""A weight that torch's operations have loaded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class TorchWeight:
    """A matrix [out, in] (or a norm's [width]) and its bias [out]; of a norm its eps, if it is a layer norm, and how
    many parts of a row are normed by themselves.

    `axis`: along which it is one rank's part, from `start` on; None: it is whole.
    """

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 0.0
    centered: bool = False
    parts: int = 1
    axis: int | None = None
    start: int = 0

    def linear(self, x: Tensor) -> Tensor:
        """[n, out] of x [n, in], a new tensor."""
        return functional.linear(x, self.weight, self.bias)

    def rows(self, index: Tensor) -> Tensor:
        """The rows of the matrix with these numbers, [n, in]."""
        return functional.embedding(index, self.weight)
