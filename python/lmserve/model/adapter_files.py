"""Reads adapters as PEFT writes them (LoRA, Hu et al. 2021): adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmserve.model import files
from lmserve.model.errors import AdapterError, CheckpointError
from lmserve.model.safetensors_source import read_safetensors_file
from lmserve.model.tensors import F32, PLAIN_TYPES, StoredTensor

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
# Of a tensor: what PEFT puts before the path of a module, the path, which of the matrices, the adapter's name in PEFT.
TENSOR: Final = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
# Before the layers, in the path of a module of a text model or of the text model within another.
PREFIXES: Final = ("", "model.", "backbone.", "language_model.", "model.language_model.", "language_model.model.")
# Settings that change what an adapter computes, with the values that change nothing.
UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": ([], {}, None),
    "alora_invocation_tokens": ([], None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
}
MOST_PATTERN: Final = 1000  # characters of a pattern of rank_pattern or alpha_pattern


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a module [outputs, inputs]: the product of `up` [outputs, rank], scaled, and `down`."""

    down: F32  # [rank, inputs]
    up: F32
    tensor: str  # the name of `down` in the file, for messages


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as its files have it. `modules`: by their paths from `layers.` on."""

    path: Path
    digest: bytes  # SHA-256 of all that it computes with
    modules: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max((len(module.down) for module in self.modules.values()), default=0)

    @property
    def size(self) -> int:
        """How many numbers its matrices have."""
        return sum(module.down.size + module.up.size for module in self.modules.values())


def read_adapter(path: str | Path, *, max_rank: int) -> Adapter:
    """Read an adapter's folder. Raises AdapterError for one that is damaged, too large, or of another kind."""
    folder = Path(path).expanduser()
    try:
        config = files.read_json(folder / CONFIG)
        if config is None:
            raise AdapterError(f"{folder} is not an adapter's folder: it has no {CONFIG}")
        if not isinstance(config, dict):
            raise AdapterError(f"{folder / CONFIG} must hold an object, but holds {type(config).__name__}")
        _check_kind(folder / CONFIG, config)
        if not files.check_regular(folder / WEIGHTS):
            raise AdapterError(f"{folder} has no {WEIGHTS} (other files must be converted to it)")
        stored = read_safetensors_file(folder / WEIGHTS)
        modules = _modules(folder / WEIGHTS, stored, Scales(folder / CONFIG, config), max_rank)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    except OSError as error:
        raise AdapterError(f"{folder} cannot be read: {error.strerror}") from error
    return Adapter(folder, _digest(modules), modules)


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{path}: peft_type must be LORA, but is {kind!r}")
    for name, neutral in UNSUPPORTED.items():
        given = config.get(name)
        if name in config and given not in neutral:
            raise AdapterError(f"{path}: {name} is {given!r}, which is not supported; it must be {neutral[0]!r}")


class Scales:
    """The rank and the scale of each module, as the configuration says."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Raises AdapterError for values that are none."""
        self._path = path
        self._rank = self._number("r", config.get("r"), whole=True)
        self._alpha = self._number("lora_alpha", config.get("lora_alpha"))
        self._root = config.get("use_rslora") is True
        self._ranks = self._patterns("rank_pattern", config.get("rank_pattern"), whole=True)
        self._alphas = self._patterns("alpha_pattern", config.get("alpha_pattern"))

    def rank(self, module: str) -> int:
        """The rank of a module, by its path in the model."""
        return int(_matching(self._ranks, module, self._rank))

    def scale(self, module: str) -> float:
        """What the product of its matrices is multiplied by."""
        rank = self.rank(module)
        return _matching(self._alphas, module, self._alpha) / (math.sqrt(rank) if self._root else rank)

    def _patterns(self, name: str, given: Any, *, whole: bool = False) -> list[tuple[re.Pattern[str], float]]:
        if given is None:
            return []
        if not isinstance(given, dict):
            raise AdapterError(f"{self._path}: {name} must be an object, but is {given!r}")
        patterns = []
        for key, value in given.items():
            try:
                if len(key) > MOST_PATTERN:
                    raise AdapterError(f"{self._path}: a key of {name} has {len(key)} characters, of {MOST_PATTERN}")
                pattern = re.compile(key if key.startswith("^") else rf"(.*\.)?({key})")
            except re.error as error:
                raise AdapterError(f"{self._path}: {name} has {key!r}, which is no pattern: {error}") from error
            patterns.append((pattern, self._number(f"{name}[{key!r}]", value, whole=whole)))
        return patterns

    def _number(self, name: str, given: Any, *, whole: bool = False) -> float:
        kinds = (int,) if whole else (int, float)
        if isinstance(given, bool) or not isinstance(given, kinds) or not 0 < given < math.inf:
            what = "a whole number from 1 on" if whole else "a number above 0"
            raise AdapterError(f"{self._path}: {name} must be {what}, but is {given!r}")
        return float(given)


def _matching(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)


def _modules(path: Path, stored: Mapping[str, StoredTensor], scales: Scales, max_rank: int) -> dict[str, LowRank]:
    matrices: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        match = TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(f"{path}: {name} is not supported; an adapter has only lora_A and lora_B of modules")
        if tensor.dtype not in PLAIN_TYPES or len(tensor.shape) != 2:
            kinds = ", ".join(PLAIN_TYPES)
            raise AdapterError(
                f"{path}: {name} must be a matrix of {kinds}, but is {tensor.dtype} {list(tensor.shape)}"
            )
        own = matrices.setdefault(match[1], {})
        if match[2] in own:
            raise AdapterError(f"{path}: {name} is there twice, with and without .default")
        own[match[2]] = tensor
    if not matrices:
        raise AdapterError(f"{path} has no tensors")
    return {
        _place(path, module): _low_rank(path, module, own, scales, max_rank) for module, own in sorted(matrices.items())
    }


def _place(path: Path, module: str) -> str:
    """The path of a module from its layer on. Raises AdapterError for one that is in no layer of a text model."""
    prefix, layers, rest = module.partition("layers.")
    if not layers or prefix not in PREFIXES:
        raise AdapterError(
            f"{path}: it changes {module}; only linear layers within a text model's layers can be changed"
        )
    return layers + rest


def _low_rank(path: Path, module: str, own: Mapping[str, StoredTensor], scales: Scales, max_rank: int) -> LowRank:
    missing = {"A", "B"} - own.keys()
    if missing:
        raise AdapterError(f"{path}: lora_{missing.pop()} of {module} is missing")
    down, up = own["A"], own["B"]
    rank = scales.rank(module)
    if rank > max_rank:
        raise AdapterError(f"{path}: {module} has rank {rank}; the limit is {max_rank} (max_lora_rank)")
    for tensor, needed in ((down, [rank, down.shape[1]]), (up, [up.shape[0], rank])):
        if list(tensor.shape) != needed:
            found = list(tensor.shape)
            raise AdapterError(f"{path}: {tensor.name} has shape {found}, but {CONFIG} needs {needed}")
    values = down.dequantize(), up.dequantize() * np.float32(scales.scale(module))
    for tensor, given in zip((down, up), values, strict=True):
        if not np.isfinite(given).all():
            raise AdapterError(f"{path}: {tensor.name} has a value that is not finite")
    return LowRank(np.ascontiguousarray(values[0]), np.ascontiguousarray(values[1]), down.name)


def _digest(modules: Mapping[str, LowRank]) -> bytes:
    digest = sha256()
    for module, own in modules.items():
        for part in (module.encode(), repr(own.down.shape).encode(), own.down.tobytes(), own.up.tobytes()):
            # The length keeps two parts apart.
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.digest()
