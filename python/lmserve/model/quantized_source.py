"""Quantized linear weights of safetensors files, as sources that compute their float values when they are read.

GPTQ packs along the inputs, lowest bits first, with zero points packed along the outputs (AutoGPTQ's QuantLinear). AWQ
packs both along the outputs, eight to a word in the order of its kernel (AutoAWQ's WQLinear_GEMM). fp8 is OCP's E4M3
without infinities, with a scale for a tensor, a row or a block (DeepSeek-V3, compressed-tensors). Of OCP's microscaling
formats, mxfp4 has two E2M1 to a byte, the lower half first, and mxfp8 E4M3, with a power of two for each 32 inputs;
nvfp4 has an E4M3 for each 16, and a float for the tensor (ModelOpt multiplies by it, compressed-tensors divides).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lmserve.model.errors import CheckpointError
from lmserve.model.quantization import Quantization
from lmserve.model.tensors import F32, PLAIN_TYPES, StoredTensor, TensorSource

I32 = NDArray[np.int32]

# Which output each of a word's eight nibbles is, lowest bits first.
AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
SCALES: Final = ("weight_scale", "weight_scale_inv")
# What the format adds for activations, which are not quantized here.
UNUSED: Final = ("input_scale", "input_global_scale", "k_scale", "v_scale")
# The name of the packed weight and of the scale of a whole tensor, in ModelOpt's files and in compressed-tensors'.
PACKED: Final = ("weight", "weight_packed")
GLOBAL: Final = ("weight_scale_2", "weight_global_scale")
# Of experts in one tensor, which are the family's to read.
EXPERT_PARTS: Final = ("_blocks", "_scales")
SMALL_FLOATS: Final = ("nvfp4", "mxfp4", "mxfp8")


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A `TensorSource` that is F32 to its reader; `parts` are what the file has of it, by their last name."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor]
    scheme: Quantization
    order: NDArray[np.int64] | None = None

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def data(self) -> NDArray[Any]:
        return max(self.parts.values(), key=lambda part: part.nbytes).data

    def raw(self) -> F32:
        return self.dequantize()

    def dequantize(self) -> F32:
        read = {"gptq": _gptq, "awq": _awq, "fp8": _fp8}.get(self.scheme.method, _small_floats)
        values = read(self.parts, self.scheme)
        return values if self.order is None else values[self.order]

    def select_rows(self, rows: NDArray[np.int64]) -> QuantizedTensor:
        order = rows if self.order is None else self.order[rows]
        return replace(self, shape=(len(rows), *self.shape[1:]), order=order)


def restore(stored: Mapping[str, StoredTensor], scheme: Quantization | None) -> dict[str, TensorSource]:
    """The float tensors among `stored`, and each quantized weight under its plain name.

    Raises CheckpointError for a part that is missing or of the wrong shape.
    """
    tensors: dict[str, TensorSource] = {}
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        layer, _, kind = name.rpartition(".")
        if scheme is not None and kind in _kinds(scheme, tensor):
            parts.setdefault(layer, {})[kind] = tensor
        elif scheme is not None and scheme.method in ("fp8", *SMALL_FLOATS) and kind in UNUSED:
            continue
        elif tensor.dtype in PLAIN_TYPES or (scheme is not None and name.endswith(EXPERT_PARTS)):
            tensors[name] = tensor
    for layer, found in parts.items():
        assert scheme is not None
        if scheme.method in SMALL_FLOATS:
            shape = _small_shape(layer, found, scheme)
        else:
            shape = _fp8_shape(layer, found, scheme) if scheme.method == "fp8" else _int_shape(layer, found, scheme)
        tensors[f"{layer}.weight"] = QuantizedTensor(f"{layer}.weight", shape, found, scheme)
    return tensors


def _kinds(scheme: Quantization, tensor: StoredTensor) -> tuple[str, ...]:
    match scheme.method:
        case "gptq":
            return ("qweight", "qzeros", "scales", "g_idx")
        case "awq":
            return ("qweight", "qzeros", "scales")
        case "fp8":
            return ("weight", *SCALES) if tensor.dtype == "F8_E4M3" else SCALES
        case "nvfp4" | "mxfp4":
            return (*PACKED, "weight_scale", *GLOBAL) if tensor.dtype == "U8" else ("weight_scale", *GLOBAL)
        case "mxfp8":
            return ("weight", *SCALES) if tensor.dtype in ("F8_E4M3", "U8") else SCALES


def _need(layer: str, parts: Mapping[str, StoredTensor], kind: str, dtypes: tuple[str, ...]) -> StoredTensor:
    part = parts.get(kind)
    if part is None:
        raise CheckpointError(f"quantization_config needs the tensor {layer}.{kind}, but it is missing")
    if part.dtype not in dtypes:
        raise CheckpointError(f"tensor {layer}.{kind} must be {' or '.join(dtypes)}, but is {part.dtype}")
    return part


def _expect(layer: str, kind: str, part: StoredTensor, shape: tuple[int, ...]) -> None:
    if part.shape != shape:
        needed, found = list(shape), list(part.shape)
        raise CheckpointError(f"tensor {layer}.{kind} has shape {found}, quantization_config needs {needed}")


def _int_shape(layer: str, parts: Mapping[str, StoredTensor], scheme: Quantization) -> tuple[int, int]:
    packed, zeros = (_need(layer, parts, kind, ("I32",)) for kind in ("qweight", "qzeros"))
    scales = _need(layer, parts, "scales", tuple(PLAIN_TYPES))
    if len(packed.shape) != 2:
        raise CheckpointError(f"tensor {layer}.qweight has shape {list(packed.shape)}, quantization_config needs two")
    per_word = 32 // scheme.bits
    rows, columns = packed.shape
    inputs, outputs = (rows * per_word, columns) if scheme.method == "gptq" else (rows, columns * per_word)
    size = inputs if scheme.group_size == -1 else scheme.group_size
    groups = -(-inputs // size)
    _expect(layer, "scales", scales, (groups, outputs))
    _expect(layer, "qzeros", zeros, (groups, outputs // per_word))
    if "g_idx" in parts:
        index = _need(layer, parts, "g_idx", ("I32",))
        _expect(layer, "g_idx", index, (inputs,))
        values = index.raw()
        if len(values) and not 0 <= values.min() <= values.max() < groups:
            given = f"[{values.min()}, {values.max()}]"
            raise CheckpointError(f"tensor {layer}.g_idx must lie in [0, {groups}), but {given} was given")
    return outputs, inputs


def _fp8_shape(layer: str, parts: Mapping[str, StoredTensor], scheme: Quantization) -> tuple[int, ...]:
    weight = _need(layer, parts, "weight", ("F8_E4M3",))
    if len(parts) != 2:
        raise CheckpointError(
            f"tensor {layer}.weight needs one of {' and '.join(SCALES)}, but {sorted(parts)} are there"
        )
    kind = next(name for name in SCALES if name in parts)
    scale = _need(layer, parts, kind, tuple(PLAIN_TYPES))
    if len(weight.shape) != 2:
        raise CheckpointError(f"tensor {layer}.weight has shape {list(weight.shape)}, quantization_config needs two")
    rows, columns = weight.shape
    if scheme.block is not None:
        _expect(layer, kind, scale, (-(-rows // scheme.block[0]), -(-columns // scheme.block[1])))
    elif scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise CheckpointError(
            f"tensor {layer}.{kind} has shape {list(scale.shape)}, quantization_config needs [1] or [{rows}, 1]"
        )
    return weight.shape


def _small_shape(layer: str, parts: Mapping[str, StoredTensor], scheme: Quantization) -> tuple[int, ...]:
    kind = next((name for name in PACKED if name in parts), "weight")
    weight = _need(layer, parts, kind, ("F8_E4M3",) if scheme.method == "mxfp8" else ("U8",))
    name = next((name for name in SCALES if name in parts), "weight_scale")
    scale = _need(layer, parts, name, ("F8_E4M3",) if scheme.method == "nvfp4" else ("U8", "F8_E8M0"))
    if len(weight.shape) != 2:
        raise CheckpointError(f"tensor {layer}.{kind} has shape {list(weight.shape)}, quantization_config needs two")
    rows, columns = weight.shape[0], weight.shape[1] * (8 // scheme.bits)
    _expect(layer, name, scale, (rows, columns // scheme.group_size))
    if columns % scheme.group_size:
        needed = f"a multiple of {scheme.group_size}"
        raise CheckpointError(f"tensor {layer}.{kind} has {columns} columns, quantization_config needs {needed}")
    whole = [part for part in GLOBAL if part in parts]
    if len(whole) != (scheme.method == "nvfp4"):
        raise CheckpointError(f"tensor {layer}.{kind} of {scheme.method} has {len(whole)} scales of the whole tensor")
    if whole and _need(layer, parts, whole[0], tuple(PLAIN_TYPES)).shape not in ((), (1,)):
        raise CheckpointError(f"tensor {layer}.{whole[0]} must have one number, but has {list(parts[whole[0]].shape)}")
    return rows, columns


def _unpacked(packed: I32, bits: int) -> NDArray[np.uint8]:
    """Each word's numbers, lowest bits first, in a new last axis: [..., 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = packed.view(np.uint32)[..., None]
    return ((words >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8)


def _gptq(parts: Mapping[str, StoredTensor], scheme: Quantization) -> F32:
    packed, scales = parts["qweight"].raw(), parts["scales"].dequantize()
    outputs = packed.shape[1]
    # [words, outputs, numbers] -> [inputs, outputs]
    values = _unpacked(packed, scheme.bits).transpose(0, 2, 1).reshape(-1, outputs)
    zeros = _unpacked(parts["qzeros"].raw(), scheme.bits).reshape(len(scales), outputs)
    zeros = (zeros + np.uint8(scheme.zero_offset)) & np.uint8(2**scheme.bits - 1)
    group = parts["g_idx"].raw() if "g_idx" in parts else _groups(len(values), scheme)
    return _scaled(values, zeros, scales, group)


def _awq(parts: Mapping[str, StoredTensor], scheme: Quantization) -> F32:
    scales = parts["scales"].dequantize()
    place = np.argsort(AWQ_ORDER)
    values, zeros = (
        _unpacked(parts[kind].raw(), scheme.bits)[..., place].reshape(-1, scales.shape[1])
        for kind in ("qweight", "qzeros")
    )
    return _scaled(values, zeros, scales, _groups(len(values), scheme))


def _groups(inputs: int, scheme: Quantization) -> NDArray[np.int64]:
    return np.arange(inputs) // (inputs if scheme.group_size == -1 else scheme.group_size)


def _scaled(values: NDArray[np.uint8], zeros: NDArray[np.uint8], scales: F32, group: NDArray[Any]) -> F32:
    """[outputs, inputs] from [inputs, outputs], and zeros and scales [groups, outputs]."""
    result: F32 = values.astype(np.float32)
    result -= zeros.astype(np.float32)[group]
    result *= scales[group]
    return np.ascontiguousarray(result.T)


def _fp8(parts: Mapping[str, StoredTensor], scheme: Quantization) -> F32:
    weight = E4M3[parts["weight"].raw()]
    scale = next(parts[kind] for kind in SCALES if kind in parts).dequantize()
    if scheme.block is None:
        scaled: F32 = weight * scale.reshape(-1, 1)
        return scaled
    rows, columns = scheme.block
    expanded = scale.repeat(rows, axis=0)[: len(weight)].repeat(columns, axis=1)[:, : weight.shape[1]]
    result: F32 = weight * expanded
    return result


def _small_floats(parts: Mapping[str, StoredTensor], scheme: Quantization) -> F32:
    stored = next(parts[kind] for kind in PACKED if kind in parts).raw()
    if scheme.bits == 8:
        values = E4M3[stored]
    else:
        values = E2M1[np.stack((stored & 0xF, stored >> 4), axis=-1).reshape(len(stored), -1)]
    scale = next(parts[kind] for kind in SCALES if kind in parts).raw()
    # Exponents of two, of which 255 is no number.
    scales = E4M3[scale] if scheme.method == "nvfp4" else np.where(scale == 255, np.nan, np.exp2(scale - 127.0))
    if scheme.method == "nvfp4":
        whole = next(parts[kind] for kind in GLOBAL if kind in parts).dequantize().reshape(())
        scales = scales / whole if scheme.inverse else scales * whole
    grouped = values.reshape(len(values), -1, scheme.group_size) * scales.astype(np.float32)[:, :, None]
    result: F32 = np.ascontiguousarray(grouped.reshape(values.shape), dtype=np.float32)
    return result


E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _e4m3() -> F32:
    bits = np.arange(256)
    sign, exponent, mantissa = np.where(bits & 0x80, -1.0, 1.0), (bits >> 3) & 0xF, bits & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[(bits & 0x7F) == 0x7F] = np.nan
    return values.astype(np.float32)


E4M3: Final = _e4m3()
