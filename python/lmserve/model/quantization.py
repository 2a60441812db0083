"""What `quantization_config` of config.json says: AutoGPTQ, AutoAWQ, fp8, compressed-tensors, ModelOpt, mxfp4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lmserve.model.errors import CheckpointError

Method = Literal["gptq", "awq", "fp8", "nvfp4", "mxfp4", "mxfp8"]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linear layers of a checkpoint are stored.

    `group_size`: inputs that share a scale (gptq, awq); -1: all. `zero_offset`: added to every stored zero point.
    `block`: rows and columns that share a scale (fp8); None: rows alone, or the whole tensor. `inverse`: the scale of a
    whole tensor (nvfp4) is divided by and not multiplied with.
    """

    method: Method
    bits: int
    group_size: int = -1
    zero_offset: int = 0
    block: tuple[int, int] | None = None
    inverse: bool = False


def read_quantization(raw: dict[str, Any]) -> Quantization | None:
    """The quantization that config.json, `raw`, tells of. Raises CheckpointError for one that cannot be read."""
    given = raw.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, dict):
        raise CheckpointError(f"config.json: quantization_config must be an object, but {given!r} was given")
    method = str(given.get("quant_method", "unknown"))
    readers = {
        "gptq": _gptq,
        "awq": _awq,
        "fp8": _fp8,
        "compressed-tensors": _compressed_tensors,
        "modelopt": _modelopt,
        "mxfp4": _mxfp4,
    }
    if method not in readers:
        known = ", ".join(readers)
        raise CheckpointError(f"config.json: quant_method is one of {known}, but {method!r} was given")
    return readers[method](given)


def _choice(given: dict[str, Any], key: str, default: Any, allowed: tuple[Any, ...], where: str) -> Any:
    value = given.get(key, default)
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise CheckpointError(f"config.json: {where} may have {key} {choices}, but {value!r} was given")
    return value


def _group_size(given: dict[str, Any], where: str) -> int:
    size = int(given.get("group_size", 128))
    if size != -1 and size < 1:
        raise CheckpointError(f"config.json: group_size of {where} is positive or -1, but {size} was given")
    return size


def _gptq(given: dict[str, Any]) -> Quantization:
    bits = _choice(given, "bits", 4, (4, 8), "gptq")
    form = _choice(given, "checkpoint_format", "gptq", ("gptq", "gptq_v2"), "gptq")
    if given.get("dynamic"):
        raise CheckpointError("config.json: gptq with dynamic, which quantizes some layers otherwise, is not supported")
    # The first format stored zero points one too low.
    return Quantization("gptq", bits, _group_size(given, "gptq"), zero_offset=1 if form == "gptq" else 0)


def _awq(given: dict[str, Any]) -> Quantization:
    bits = _choice(given, "bits", 4, (4,), "awq")
    _choice({"version": str(given.get("version", "gemm")).lower()}, "version", "gemm", ("gemm",), "awq")
    _choice(given, "zero_point", True, (True,), "awq")
    return Quantization("awq", bits, _group_size(given, "awq"))


def _fp8(given: dict[str, Any]) -> Quantization:
    _choice(given, "fmt", "e4m3", ("e4m3",), "fp8")
    return Quantization("fp8", 8, block=_block(given.get("weight_block_size")))


def _compressed_tensors(given: dict[str, Any]) -> Quantization:
    where = "compressed-tensors"
    formats = ("float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
    form = _choice(given, "format", "float-quantized", formats, where)
    for key, name in (("kv_cache_scheme", "a quantized KV cache"), ("sparsity_config", "sparsity")):
        if given.get(key) and given[key].get("format") != "dense":
            raise CheckpointError(f"config.json: {where} with {name} ({key}) is not supported")
    if form == "nvfp4-pack-quantized":
        return Quantization("nvfp4", 4, group_size=16, inverse=True)
    if form != "float-quantized":
        return Quantization("mxfp4", 4, group_size=32) if "mxfp4" in form else Quantization("mxfp8", 8, group_size=32)
    blocks = set()
    for group in (given.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        _choice(weights, "type", "int", ("float",), where)
        _choice(weights, "num_bits", 8, (8,), where)
        strategy = _choice(weights, "strategy", "tensor", ("tensor", "channel", "block"), where)
        blocks.add(_block(weights.get("block_structure")) if strategy == "block" else None)
    if len(blocks) != 1:
        raise CheckpointError(f"config.json: {where} must have one kind of scales, but {len(blocks)} were given")
    return Quantization("fp8", 8, block=blocks.pop())


def _mxfp4(_given: dict[str, Any]) -> Quantization:
    return Quantization("mxfp4", 4, group_size=32)


def _modelopt(given: dict[str, Any]) -> Quantization:
    algorithm = _choice(given, "quant_algo", None, ("FP8", "NVFP4", "MXFP8"), "modelopt")
    if algorithm == "FP8":
        return Quantization("fp8", 8)
    if algorithm == "MXFP8":
        return Quantization("mxfp8", 8, group_size=32)
    size = int(given.get("group_size") or 16)
    if size != 16:
        raise CheckpointError(f"config.json: group_size of nvfp4 is 16, but {size} was given")
    return Quantization("nvfp4", 4, group_size=16)


def _block(given: Any) -> tuple[int, int] | None:
    if given is None:
        return None
    if not (isinstance(given, list) and len(given) == 2 and all(type(n) is int and n > 0 for n in given)):
        raise CheckpointError(f"config.json: a block of scales is two positive numbers, but {given!r} was given")
    return given[0], given[1]
