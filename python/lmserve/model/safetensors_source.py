"""Tensors of a Hugging Face folder: safetensors files, one or sharded by an index, mapped and not read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmserve.model import files
from lmserve.model.errors import CheckpointError
from lmserve.model.tensors import PLAIN_TYPES, StoredTensor

# Of quantized weights, their parts too.
KNOWN_TYPES = (
    PLAIN_TYPES
    | {"I32": np.dtype("<i4"), "F8_E4M3": np.dtype("u1")}
    | {
        # Floats of four bits, and powers of two, as bytes.
        "U8": np.dtype("u1"),
        "F8_E8M0": np.dtype("u1"),
    }
)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A real header is a few MB at most; this bounds what a broken length field can make us read.
MAX_HEADER_BYTES = 100_000_000


def read_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files by its stored name; types that are not known are bytes."""
    tensors: dict[str, StoredTensor] = {}
    for path, names in _shards(folder):
        stored = read_safetensors_file(path)
        if names is not None:
            missing = sorted(names - stored.keys())
            if missing:
                raise CheckpointError(f"{path}: {INDEX} names the tensor {missing[0]}, but it is missing")
        tensors |= stored
    return tensors


def _shards(folder: Path) -> list[tuple[Path, set[str] | None]]:
    index = folder / INDEX
    found = files.read_json(index, files.MAX_INDEX)
    if found is not None:
        try:
            weight_map: dict[str, str] = found["weight_map"]
            shards: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                shards.setdefault(file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from error
        for file in shards:
            if Path(file).name != file or not files.check_regular(folder / file):
                raise CheckpointError(f"{folder}: {INDEX} names the shard {file}, but it is missing")
        return [(folder / file, names) for file, names in sorted(shards.items())]
    if files.check_regular(folder / SINGLE):
        return [(folder / SINGLE, None)]
    others = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth")))
    raise CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}"
        + (f"; {others} must be converted to safetensors first" if others else "")
    )


def read_safetensors_file(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file by its stored name. Raises CheckpointError, or OSError."""
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(f"{path} is truncated: it has {size} bytes, but a safetensors file has at least 8")
    mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
    header_bytes = int(mapped[:8].view("<u8")[0])
    if header_bytes > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: its header has {header_bytes} bytes, but the "
            f"file has {size}"
        )
    try:
        header: dict[str, Any] = files.parse_json(f"the header of {path}", bytes(mapped[8 : 8 + header_bytes]))
        header.pop("__metadata__", None)
        return {name: _tensor(path, name, entry, mapped[8 + header_bytes :]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a broken safetensors header: {error!r}") from error


def _tensor(path: Path, name: str, entry: dict[str, Any], data: NDArray[np.uint8]) -> StoredTensor:
    dtype = str(entry["dtype"])
    shape = tuple(int(extent) for extent in entry["shape"])
    start, end = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= start <= end <= len(data):
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {end} of its data, but it has {len(data)} bytes"
        )
    stored = data[start:end]
    numbers = KNOWN_TYPES.get(dtype)
    if numbers is None:
        return StoredTensor(name, shape, dtype, stored)
    expected = math.prod(shape) * numbers.itemsize
    if end - start != expected or any(extent < 0 for extent in shape):
        raise CheckpointError(f"{path}: {name} {dtype} {list(shape)} needs {expected} bytes, but has {end - start}")
    return StoredTensor(name, shape, dtype, stored.view(numbers).reshape(shape))
