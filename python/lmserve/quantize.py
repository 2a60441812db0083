"""Rounds the weights of a GGUF file to fewer bits, into another GGUF file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from lmserve._core import encode_blocks
from lmserve.errors import LmserveError
from lmserve.model.gguf_source import open_header, read_tensors
from lmserve.model.tensors import PLAIN_TYPES, StoredTensor

BLOCK: Final = 32
SUPER: Final = 256
# Weights that are dequantized at a time.
PART: Final = 1 << 25
# Of a type whose blocks have 256 weights, the type for rows that are no such blocks: as many bits, and a scale of their
# own for each 32.
NARROW: Final = {"Q4_K": "Q4_1", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# What is small, and what other programs read as floats alone.
KEPT: Final = re.compile(
    r"norm|ffn_gate_inp|ssm_conv1d|ssm_(alpha|beta|ba|x|dt)\b|shortconv\.conv|altup|laurel|position_embd|token_types|rel_b"
)
LAYER: Final = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Mixture:
    """The types of a file: `file_type` is llama.cpp's number of it.

    few: most weights. more: values and down projections of some layers, and the head; as llama.cpp's mixtures of the
    same name.
    """

    file_type: int
    few: str
    more: str


MIXTURES: Final = {
    "Q4_K_M": Mixture(15, "Q4_K", "Q6_K"),
    "Q5_K_M": Mixture(17, "Q5_K", "Q6_K"),
    "Q6_K": Mixture(18, "Q6_K", "Q6_K"),
    "Q8_0": Mixture(7, "Q8_0", "Q8_0"),
}


@dataclass(frozen=True, slots=True)
class Rounded:
    """What became of a file: bytes of its tensors before and after, and its number of weights."""

    bytes_before: int
    bytes_after: int
    weights: int


class QuantizeError(Exception):
    """A file that cannot be quantized, in one line."""


def types_of(tensors: dict[str, StoredTensor], mixture: Mixture, layers: int) -> dict[str, str]:
    """The type of each tensor that is rounded."""
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(".weight") or len(tensor.shape) < 2 or KEPT.search(name) or tensor.shape[-1] % BLOCK:
            continue
        kind = mixture.more if name == head or _counts_more(name, layers) else mixture.few
        if tensor.shape[-1] % SUPER:
            kind = NARROW.get(kind, kind)
        if kind != tensor.dtype:
            found[name] = kind
    return found


def _counts_more(name: str, layers: int) -> bool:
    """Whether its errors cost most: in the first and the last eighth of the layers, and in each third between."""
    at = LAYER.match(name)
    if at is None or not re.search(r"\.(attn_v|ffn_down)(_exps|_shexp)?\.", name):
        return False
    layer = int(at[1])
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def quantize(
    source: Path,
    target: Path,
    mixture: Mixture,
    progress: Callable[[int, int], None],
    *,
    threads: int,
    again: bool = False,
) -> Rounded:
    """Write `source`, a GGUF file or the first of several, to `target`.

    again: also of a file whose weights are rounded already. threads: that compute. Raises QuantizeError for a file
    that cannot be rounded, CheckpointError for one that cannot be read, and OSError where the target cannot be written;
    then no part of it is left.
    """
    header = open_header(source)
    architecture = header.get("general.architecture")
    tensors = read_tensors(source, header)
    if not again:
        _check_plain(tensors)
    layers = header.get(f"{architecture}.block_count")
    types = types_of(tensors, mixture, layers if isinstance(layers, int) else 0)
    part = target.with_name(f"{target.name}.part")
    writer = GGUFWriter(part, str(architecture))
    try:
        for name, value, kinds in _metadata(source):
            writer.add_key_value(name, value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
        writer.add_file_type(mixture.file_type)
        writer.add_quantization_version(2)
        sizes = [_announce(writer, tensor, types.get(name)) for name, tensor in tensors.items()]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
        for name, tensor in tensors.items():
            writer.write_tensor_data(_data(tensor, types.get(name), threads))
            done += tensor.nbytes
            progress(done, total)
        writer.close()
        part.replace(target)
    except BaseException:
        for file in writer.fout or ():
            # What it still holds may be what cannot be written.
            with suppress(OSError):
                file.close()
        part.unlink(missing_ok=True)
        raise
    return Rounded(total, sum(sizes), sum(math.prod(tensor.shape) for tensor in tensors.values()))


def _check_plain(tensors: dict[str, StoredTensor]) -> None:
    rounded = next((tensor for tensor in tensors.values() if tensor.dtype not in PLAIN_TYPES), None)
    if rounded is not None:
        raise QuantizeError(
            f"{rounded.name} is {rounded.dtype} already, and to round it again loses more than to round its floats; "
            "use a file in F32, F16 or BF16, or --allow-requantize"
        )


def _metadata(source: Path) -> Iterator[tuple[str, Any, list[GGUFValueType]]]:
    """Keys of the first file, but for those that the writer writes and those of files that are split."""
    own = ("GGUF.", "split.", "general.architecture", "general.file_type", "general.quantization_version")
    try:
        fields = GGUFReader(source).fields
    except ValueError as error:
        raise QuantizeError(f"{source}: {error}") from error
    for name, field in fields.items():
        if not name.startswith(own):
            yield name, field.contents(), field.types


def _announce(writer: GGUFWriter, tensor: StoredTensor, kind: str | None) -> int:
    """Adds the tensor to the header. Returns its bytes."""
    shape, dtype = tensor.shape, np.dtype(np.uint8)
    if kind is not None:
        elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        shape = (*shape[:-1], shape[-1] // elements * size)
        nbytes = math.prod(shape)
    else:
        raw, nbytes = tensor.raw(), tensor.nbytes
        dtype = raw.dtype
        if tensor.dtype not in PLAIN_TYPES:
            shape = (*shape[:-1], raw.shape[-1])
    writer.add_tensor_info(tensor.name, shape, dtype, nbytes, GGMLQuantizationType[kind or tensor.dtype])
    return nbytes


def _data(tensor: StoredTensor, kind: str | None, threads: int) -> NDArray[Any]:
    if kind is None:
        return tensor.raw()
    width = tensor.shape[-1]
    rows = tensor.raw().reshape(math.prod(tensor.shape[:-1]), -1)
    step = max(PART // width, 1)
    blocks = []
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        values = replace(tensor, shape=(len(some), width), data=some).dequantize()
        try:
            blocks.append(encode_blocks(kind, np.ascontiguousarray(values, np.float32), threads))
        except LmserveError as error:
            raise QuantizeError(f"{tensor.name}: {error}") from error
    return np.frombuffer(b"".join(blocks), np.uint8)
