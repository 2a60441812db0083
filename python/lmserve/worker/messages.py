"""What a process is told when it starts, what it answers, and texts to embed."""

from __future__ import annotations

from typing import Any, Self

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from lmserve.errors import LmserveError
from lmserve.model.interface import F32, I32, RunnerInfo, StepBuffers


class Start(Struct, frozen=True, kw_only=True):
    """The model that a process loads, and how: the fields of `RunnerOptions`."""

    model: str
    fingerprint: bytes
    options: dict[str, Any]
    rank: int = 0
    store: str = ""  # the file by which several ranks find each other


class Ready(Struct, frozen=True, kw_only=True):
    """What has been loaded, and type and shape of each array of its `StepBuffers`."""

    info: RunnerInfo
    arrays: dict[str, tuple[str, list[int]]]

    @classmethod
    def of(cls, info: RunnerInfo, buffers: StepBuffers) -> Self:
        """Of a loaded runner."""
        names = StepBuffers.__dataclass_fields__
        arrays: dict[str, NDArray[Any]] = {name: getattr(buffers, name) for name in names}
        return cls(info=info, arrays={name: (each.dtype.str, list(each.shape)) for name, each in arrays.items()})

    def buffers(self) -> StepBuffers:
        """Such arrays in this process."""
        made: dict[str, Any] = {name: np.zeros(shape, dtype) for name, (dtype, shape) in self.arrays.items()}
        return StepBuffers(**made)


class Refused(Struct, frozen=True, kw_only=True):
    """Why a model cannot be loaded: an `LmserveError`."""

    status: int
    error: dict[str, Any]

    @classmethod
    def of(cls, error: LmserveError) -> Self:
        """The error as a message."""
        return cls(status=error.status, error=error.error)


class Texts(Struct, frozen=True, kw_only=True):
    """Token ids of texts, and where each begins and ends, in 32 bits."""

    token_ids: bytes
    bounds: bytes

    @classmethod
    def of(cls, token_ids: I32, bounds: I32) -> Self:
        """The arrays as a message."""
        return cls(token_ids=token_ids.astype(np.int32).tobytes(), bounds=bounds.astype(np.int32).tobytes())

    def arrays(self) -> tuple[I32, I32]:
        """Token ids and bounds."""
        return np.frombuffer(self.token_ids, np.int32), np.frombuffer(self.bounds, np.int32)


class Vectors(Struct, frozen=True, kw_only=True):
    """What a model says of texts: a row of 32-bit floats for each."""

    width: int
    values: bytes

    @classmethod
    def of(cls, vectors: F32) -> Self:
        """The rows as a message."""
        return cls(width=vectors.shape[1], values=np.ascontiguousarray(vectors, np.float32).tobytes())

    def array(self) -> F32:
        """The rows."""
        return np.frombuffer(self.values, np.float32).reshape(-1, self.width)


encode = msgspec.msgpack.encode
decode = msgspec.msgpack.decode
