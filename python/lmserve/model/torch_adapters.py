"""What adapters add to linear layers, on torch: the rows of a step, grouped by the adapters of their sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lmserve.model.interface import F32, I32
from lmserve.model.linears import Change
from lmserve.model.torch_weight import TorchWeight

# The first output that is changed, and matrices [rank, inputs] and [outputs, rank].
Part = tuple[int, Tensor, Tensor]


class TorchAdapters:
    """The adapters that are loaded, and which rows of the step have one."""

    def __init__(self, upload: Callable[[F32], Tensor]) -> None:
        """`upload`: an array as a tensor of the weights' device and type."""
        self._upload = upload
        self._loaded: dict[int, dict[int, list[Part]]] = {}
        # For so many rows, those of each adapter.
        self._rows: dict[int, dict[int, Tensor]] = {}

    def load(self, number: int, changes: Sequence[Change[TorchWeight]]) -> None:
        """Take an adapter in. Steps may run meanwhile."""
        parts: dict[int, list[Part]] = {}
        for change in changes:
            part = change.first, self._upload(change.down), self._upload(change.up)
            parts.setdefault(id(change.weight), []).append(part)
        self._loaded[number] = parts

    def unload(self, number: int) -> None:
        """Forget an adapter."""
        self._loaded.pop(number, None)

    def begin(self, adapters: I32, query_start: I32, sample_rows: I32, device: torch.device) -> None:
        """Start a step of sequences with these adapters, 0 for none. Raises RuntimeError for one that is not loaded."""
        self._rows = {}
        if not adapters.any():
            return
        unknown = set(adapters.tolist()) - self._loaded.keys() - {0}
        if unknown:
            raise RuntimeError(f"adapter {min(unknown)} is not loaded")
        tokens = np.repeat(adapters, np.diff(query_start))
        # Where there are as many sampled rows as tokens, they are the same.
        for rows in (tokens, tokens[sample_rows]):
            self._rows[len(rows)] = {
                number: torch.from_numpy(np.flatnonzero(rows == number)).to(device)
                for number in np.unique(rows).tolist()
                if number
            }

    def end(self) -> None:
        """What follows has no adapters."""
        self._rows = {}

    def add(self, x: Tensor, y: Tensor, w: TorchWeight) -> Tensor:
        """y = w(x), to whose rows it adds what their adapters make of x."""
        for number, rows in self._rows.get(len(x), {}).items():
            for first, down, up in self._loaded[number].get(id(w), ()):
                added = (x[rows] @ down.T) @ up.T
                y[:, first : first + len(up)].index_add_(0, rows, added)
        return y
