"""Which linear layers a model has loaded, and which of their outputs an adapter changes.

A loaded layer is made of parts side by side (q, k and v), while a file may have them as one tensor, or their rows in
another order. Each part knows the tensor of the file and the rows that it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmserve.model.adapter_files import PREFIXES, Adapter, LowRank
from lmserve.model.errors import AdapterError
from lmserve.model.quantized_source import QuantizedTensor
from lmserve.model.shares import Part
from lmserve.model.tensors import F32, ScaledTensor, StoredTensor, TensorSource

W = TypeVar("W")

LAYERS: Final = ("layers.", "blk.")  # how the modules of layers begin, in safetensors and in GGUF files


@dataclass(frozen=True, slots=True)
class LinearPart(Generic[W]):
    """Outputs of a loaded layer, from `first` on: `rows` of a tensor of the file, times `factor`.

    `columns`: of its `inputs` those that the layer reads. `whole`: the layers have all its rows; otherwise those of one
    rank of tensor parallelism.
    """

    weight: W
    first: int
    rows: NDArray[np.int64]
    inputs: int
    factor: float
    columns: slice
    whole: bool


@dataclass(frozen=True, slots=True)
class Change(Generic[W]):
    """What an adapter adds to outputs of a loaded layer, from `first` on."""

    weight: W
    first: int
    down: F32  # [rank, inputs]
    up: F32  # [outputs, rank], scaled


class Linears(Generic[W]):
    """The linear layers within a model's layers, by their paths from `layers.` on or GGUF's names."""

    def __init__(self) -> None:
        self._parts: dict[str, list[LinearPart[W]]] = {}
        self._odd: set[str] = set()  # made of their tensors in a way that no adapter can follow

    @property
    def modules(self) -> list[str]:
        """The modules that an adapter can change."""
        return [module for module in self._parts if module.startswith(LAYERS) and module not in self._odd]

    def add(self, weight: W, sources: Sequence[TensorSource]) -> None:
        """Note a layer whose outputs are those of `sources`, side by side."""
        first = 0
        for source in sources:
            rows = source.shape[0]
            module = _module(source.name)
            part = _part(weight, first, source)
            if part is None:
                self._odd.add(module)
            else:
                self._parts.setdefault(module, []).append(part)
            first += rows

    def changes(self, adapter: Adapter) -> list[Change[W]]:
        """What an adapter does to which layers. Raises AdapterError where it does not fit them."""
        changes: list[Change[W]] = []
        for module, own in adapter.modules.items():
            parts = self._parts.get(module, [])
            if not parts or module in self._odd:
                raise AdapterError(f"{adapter.path}: it changes {module}, {self._why_not(module)}")
            outputs = 1 + max(int(part.rows.max()) for part in parts)
            self._check(adapter, own, outputs, parts)
            changes += [
                Change(part.weight, part.first, own.down[:, part.columns], own.up[part.rows] * np.float32(part.factor))
                for part in parts
            ]
        return changes

    def _check(self, adapter: Adapter, own: LowRank, outputs: int, parts: Sequence[LinearPart[W]]) -> None:
        rank, inputs = len(own.down), parts[0].inputs
        if not all(part.whole for part in parts):
            # Which outputs there are is known where all of them are.
            outputs = max(outputs, len(own.up))
        other = own.tensor.replace(".lora_A", ".lora_B")
        for name, found, needed in (
            (own.tensor, own.down.shape, (rank, inputs)),
            (other, own.up.shape, (outputs, rank)),
        ):
            if found != needed:
                message = f"{name} has shape {list(found)}, but the model needs {list(needed)}"
                raise AdapterError(f"{adapter.path}: {message}")
        loaded = np.unique(np.concatenate([part.rows for part in parts]))
        if all(part.whole for part in parts) and len(loaded) != outputs:
            raise AdapterError(f"{adapter.path}: {other} has outputs that the model has in no linear layer")

    def _why_not(self, module: str) -> str:
        layer = ".".join(module.split(".")[:2])
        if "expert" in module:
            return "but adapters of experts are not supported"
        names = sorted({name.removeprefix(f"{layer}.") for name in self._parts if name.startswith(f"{layer}.")})
        if not names:
            return f"but the model has no {layer} with linear layers that an adapter can change"
        return f"but in {layer} an adapter can change only: {', '.join(names)}"


def _module(tensor: str) -> str:
    """The path of a tensor's module from its layer on; all of it where that is no layer of the text model."""
    prefix, layers, rest = tensor.removesuffix(".weight").partition("layers.")
    return layers + rest if prefix in PREFIXES else prefix + layers + rest


def _part(weight: W, first: int, source: TensorSource) -> LinearPart[W] | None:
    factor, whole, columns = 1.0, True, slice(None)
    while isinstance(source, ScaledTensor | Part):
        if isinstance(source, ScaledTensor):
            # An adapter changes the values, however they are stored.
            factor *= 1.0 if source.stored else source.factor
            source = source.source
        elif source.axis == 0:
            whole, source = False, source.rows()
        else:
            columns, source = slice(source.start, source.stop), source.whole
    if not isinstance(source, StoredTensor | QuantizedTensor):
        return None
    rows, inputs = source.shape
    order = np.arange(rows) if source.order is None else source.order
    return LinearPart(weight, first, order, inputs, factor, columns, whole)
