"""Tensor parallelism: what one of several ranks holds of a model, and which part of each stored tensor it reads.

A rank runs the model file with a configuration that has its share of the heads, of the widths of feed-forward networks
and experts, and of the vocabulary. So it requests smaller tensors than are stored, and the dimension that is smaller
says how a tensor is split (Shoeybi et al. 2019, Megatron-LM): by rows, where each rank computes some of the outputs; by
columns, where each rank has some of the inputs, and the outputs are added over all ranks. Whatever has its whole size,
such as a layer with a recurrent state, every rank holds and computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmserve.model.config import EncoderConfig, ModelConfig
from lmserve.model.errors import CheckpointError, OptionError
from lmserve.model.expert_tensors import StackedTensor, split
from lmserve.model.tensors import F32, PLAIN_TYPES, StoredTensor, TensorSource

C = TypeVar("C")

# Fields of configurations, and of what they hold, that are widths of networks; None, where there is none.
WIDTHS: Final = ("intermediate_size", "expert_size", "shared_size", "size", "inner_sizes")
HEADS: Final = ("num_heads", "heads")
ROWS: Final = ("vocab_size", "layer_vocab_size")
# What a configuration holds that has such fields of its own.
PARTS: Final = ("attention", "sizes", "experts")


@dataclass(frozen=True, slots=True)
class Share:
    """The share of one of `ranks` processes."""

    rank: int
    ranks: int

    def rows(self, whole: int) -> tuple[int, int]:
        """Where its rows of a table begin and end that need not be divisible."""
        step = -(-whole // self.ranks)
        return min(self.rank * step, whole), min((self.rank + 1) * step, whole)

    def start(self, whole: int, own: int) -> int:
        """Where its part of `own` of `whole` begins. Ranks that have the same heads of keys begin at the same."""
        first, end = self.rows(whole)
        if whole % self.ranks and end - first == own:
            return first
        return self.rank * whole // (self.ranks * own) * own


@dataclass(frozen=True, slots=True)
class Place:
    """A process's share in its group, and the file by which the processes find each other.

    The file is in a folder that only they use.
    """

    share: Share
    store: str


def split_config(config: ModelConfig, share: Share) -> ModelConfig:
    """The configuration that a rank runs the model file with.

    Raises OptionError for an encoder, and if the heads or a width cannot be divided among so many ranks.
    """
    if isinstance(config, EncoderConfig):
        raise _refused(f"{config.architecture} is an encoder, which runs in one process", share)
    return _divided(config, config.architecture, share)


def _divided(holder: C, family: str, share: Share) -> C:
    if not is_dataclass(holder):
        return holder
    changes: dict[str, Any] = {}
    for field in fields(holder):
        name, value = field.name, getattr(holder, field.name)
        if name in HEADS:
            changes[name] = _even(value, family, "query heads", share)
        elif name == "num_kv_heads":
            changes[name] = _kv_heads(value, family, share)
        elif name in WIDTHS and isinstance(value, int):
            changes[name] = _even(value, family, name, share)
        elif name in WIDTHS and isinstance(value, tuple):
            changes[name] = tuple(_even(width, family, name, share) for width in value)
        elif name in ROWS and value:
            first, end = share.rows(value)
            if first == end:
                raise _refused(f"{family} has {name} {value}", share)
            changes[name] = end - first
        elif name in PARTS and isinstance(value, tuple):
            changes[name] = tuple(_divided(part, family, share) for part in value)
        elif name in PARTS:
            changes[name] = _divided(value, family, share)
    # What is no argument of the class is derived from the others.
    given = {field.name for field in fields(holder) if field.init}
    return replace(holder, **{name: value for name, value in changes.items() if name in given})  # type: ignore[type-var]


def _even(whole: int, family: str, what: str, share: Share) -> int:
    if whole % share.ranks:
        raise _refused(f"{family} has {whole} {what} here, which {share.ranks} does not divide", share)
    return whole // share.ranks


def _kv_heads(whole: int, family: str, share: Share) -> int:
    """Ranks have the same ones where there are fewer than ranks."""
    if whole % share.ranks == 0:
        return whole // share.ranks
    if share.ranks % whole == 0:
        return 1
    raise _refused(f"{family} has {whole} key-value heads here; one number must divide the other", share)


def _refused(why: str, share: Share) -> OptionError:
    return OptionError("tensor_parallel", f"tensor_parallel is {share.ranks}; {why}")


@dataclass(frozen=True, slots=True)
class Part:
    """A `TensorSource`: a rank's part of another along one of its dimensions."""

    whole: TensorSource
    axis: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.whole.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)

    @property
    def dtype(self) -> str:
        return "F32" if self.axis else self.whole.dtype

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes * (self.stop - self.start) // self.whole.shape[self.axis]

    @property
    def data(self) -> NDArray[Any]:
        return self.whole.data

    def raw(self) -> NDArray[Any]:
        return self.rows().raw() if self.axis == 0 else self.dequantize()

    def dequantize(self) -> F32:
        if self.axis == 0:
            return self.rows().dequantize()
        columns = _stored_columns(self.whole, self.start, self.stop) if self.axis == 1 else None
        if columns is not None:
            return columns.dequantize()
        chosen: F32 = self.whole.dequantize().take(range(self.start, self.stop), axis=self.axis)
        return chosen

    def select_rows(self, rows: NDArray[np.int64]) -> Self:
        if self.axis == 0:
            return replace(self, whole=self.rows().select_rows(rows), start=0, stop=len(rows))
        return replace(self, whole=self.whole.select_rows(rows))

    def experts(self) -> StackedTensor:
        """The parts of the single experts of a tensor [experts, ...] that is split within each."""
        parts = tuple(replace(self, whole=each, axis=self.axis - 1) for each in split(self.whole))
        return StackedTensor(self.name, parts)

    def rows(self) -> TensorSource:
        """The source of one that is split by rows."""
        return self.whole.select_rows(np.arange(self.start, self.stop))


def _stored_columns(source: TensorSource, start: int, stop: int) -> StoredTensor | None:
    """Columns of a matrix in a file, without reading the others; None where they are no whole blocks."""
    if not isinstance(source, StoredTensor) or source.order is not None or len(source.shape) != 2:
        return None
    rows, columns = source.shape
    if source.dtype in PLAIN_TYPES:
        return StoredTensor(source.name, (rows, stop - start), source.dtype, source.data[:, start:stop])
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[source.dtype]]
    if start % block or stop % block or columns % block:
        return None
    data = np.ascontiguousarray(source.data[:, start // block * size : stop // block * size])
    return StoredTensor(source.name, (rows, stop - start), source.dtype, data)


def part_of(source: TensorSource, shape: tuple[int, ...], share: Share) -> TensorSource:
    """What a rank reads of a stored tensor of which it requests this shape. Raises CheckpointError if it cannot."""
    differing = [axis for axis, (whole, own) in enumerate(zip(source.shape, shape, strict=True)) if whole != own]
    if not differing:
        return source
    axis = differing[0]
    whole, own = source.shape[axis], shape[axis]
    start = share.start(whole, own)
    if len(differing) > 1 or start + own > whole:
        raise CheckpointError(f"{source.name} {source.shape} cannot be split into parts {shape}")
    return Part(source, axis, start, start + own)


def parts_of(
    tensors: Mapping[str, TensorSource], shapes: Mapping[str, tuple[int, ...]], share: Share
) -> dict[str, TensorSource]:
    """What a rank reads of all tensors of a model, by the shapes that it requests. Raises CheckpointError."""
    return {name: part_of(tensors[name], shape, share) for name, shape in shapes.items()}
