"""How a model file requests its weights: by name and shape, once, in its constructor.

The same constructor determines which tensors a checkpoint must have (`expected_tensors`, from headers only) and loads
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import numpy as np

from lmserve.model.activation import Activation
from lmserve.model.expert_tensors import ExpertSources
from lmserve.model.ops import Ops
from lmserve.model.router import Router
from lmserve.model.tensors import StoredTensor, TensorSource, constant

A = TypeVar("A")
W = TypeVar("W")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Loader(Generic[A, W]):
    """Loads weights into `ops`. Names are those of Hugging Face, under `prefix`; sizes are in elements."""

    ops: Ops[A, W]
    find: Callable[[str, Shape], TensorSource]
    prefix: str = ""

    def within(self, prefix: str) -> Loader[A, W]:
        """The loader of the names that begin with this prefix and a dot."""
        return replace(self, prefix=f"{self.prefix}{prefix}.")

    def linear(self, outputs: Mapping[str, int] | Sequence[tuple[str, int]], inputs: int, *, bias: bool = False) -> W:
        """Layers of `inputs` columns as one, their outputs (name and rows) side by side in the order given."""
        parts = list(outputs.items()) if isinstance(outputs, Mapping) else outputs
        weights = [self.tensor(f"{name}.weight", (rows, inputs)) for name, rows in parts]
        biases = [self.tensor(f"{name}.bias", (rows,)) for name, rows in parts] if bias else None
        return self.ops.load_linear(weights, biases)

    def embedding(self, name: str, rows: int, width: int, *, head: bool) -> W:
        """A table of embeddings; `head`: it is the head as well."""
        return self.ops.load_embedding(self.tensor(f"{name}.weight", (rows, width)), head=head)

    def rms_norm(self, name: str, width: int, eps: float, *, parts: int = 1) -> W:
        """The weight of an RMS norm, or of one of each of so many parts of a row."""
        return self.ops.load_rms_norm(self.tensor(f"{name}.weight", (width,)), eps, parts)

    def unweighted_rms_norm(self, width: int, eps: float) -> W:
        """An RMS norm whose weights are all 1, which no file stores."""
        return self.ops.load_rms_norm(constant("1", [1.0] * width), eps)

    def layer_norm(self, name: str, width: int, eps: float, *, bias: bool) -> W:
        """The weight and bias of a layer norm."""
        own = self.tensor(f"{name}.bias", (width,)) if bias else None
        return self.ops.load_layer_norm(self.tensor(f"{name}.weight", (width,)), own, eps)

    def conv(self, name: str, channels: int, kernel: int, *, bias: bool = False) -> W:
        """The weight and bias of a causal convolution of each channel."""
        own = self.tensor(f"{name}.bias", (channels,)) if bias else None
        return self.ops.load_conv(self.tensor(f"{name}.weight", (channels, 1, kernel)), own)

    def scan(self, heads: int, *, skip: bool = False, limits: tuple[float, float] = (0.0, math.inf)) -> W:
        """The numbers of a recurrence: A, which is negative, dt_bias, and D if it has one."""
        decay, bias = self.tensor("A", (heads,)), self.tensor("dt_bias", (heads,))
        return self.ops.load_scan(decay, bias, self.tensor("D", (heads,)) if skip else None, limits)

    def number(self, name: str) -> float:
        """A tensor of one number; 1 where nothing is loaded."""
        values = self.tensor(name, (1,)).dequantize().reshape(-1)
        return float(values[0]) if len(values) else 1.0

    def heads(self, name: str, heads: int, outputs: int, inputs: int) -> W:
        """A linear layer for each head."""
        return self.ops.load_heads(self.tensor(f"{name}.weight", (heads, outputs, inputs)))

    def sinks(self, name: str, heads: int) -> W:
        """The sinks of a layer's attention."""
        return self.ops.load_sinks(self.tensor(name, (heads,)))

    def distances(self, name: str, heads: int, longest: int) -> W:
        """What attention adds to scores by distance, for texts of up to `longest` tokens."""
        return self.ops.load_distances(self.tensor(name, (heads, 2 * longest - 1)))

    def tensor(self, name: str, shape: Shape) -> TensorSource:
        """What is stored under a name, of this shape."""
        return self.find(self.prefix + name, shape)


class Nowhere:
    """The loading half of `Ops` that loads nothing."""

    def load_linear(self, sources: Sequence[TensorSource], bias: Sequence[TensorSource] | None = None) -> None:
        """Nothing."""

    def load_embedding(self, source: TensorSource, *, head: bool) -> None:
        """Nothing."""

    def load_rms_norm(self, source: TensorSource, eps: float, parts: int = 1) -> None:
        """Nothing."""

    def load_layer_norm(self, source: TensorSource, bias: TensorSource | None, eps: float) -> None:
        """Nothing."""

    def load_heads(self, source: TensorSource) -> None:
        """Nothing."""

    def load_sinks(self, source: TensorSource) -> None:
        """Nothing."""

    def load_distances(self, source: TensorSource) -> None:
        """Nothing."""

    def load_router(self, source: TensorSource, router: Router, **_others: TensorSource | None) -> None:
        """Nothing."""

    def load_experts(self, sources: ExpertSources, activation: Activation, *, scaled_inputs: bool = False) -> None:
        """Nothing."""

    def load_conv(self, source: TensorSource, bias: TensorSource | None = None) -> None:
        """Nothing."""

    def load_scan(self, *numbers: object) -> None:
        """Nothing."""


def expected_tensors(build: Callable[[Loader[Any, Any]], object]) -> dict[str, Shape]:
    """Canonical name and shape of every tensor that `build` loads."""
    shapes: dict[str, Shape] = {}

    def find(name: str, shape: Shape) -> TensorSource:
        shapes[name] = shape
        return StoredTensor(name, shape, "F32", np.zeros(0, np.float32))

    build(Loader(cast("Ops[Any, Any]", Nowhere()), find))
    return shapes
