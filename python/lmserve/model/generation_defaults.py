"""The publisher's sampling defaults: from generation_config.json, or a GGUF file's `general.sampling.*`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lmserve.model.errors import CheckpointError

GENERATION_CONFIG: Final = "generation_config.json"
GGUF_PREFIX: Final = "general.sampling"

# Of each value: its key in generation_config.json, that under `general.sampling`, the least and the largest.
_KEYS: Final[dict[str, tuple[str, str, float, float]]] = {
    "temperature": ("temperature", "temp", 0.0, 2.0),
    "top_k": ("top_k", "top_k", 0, 2**31 - 1),
    "top_p": ("top_p", "top_p", 0.0, 1.0),
    "min_p": ("min_p", "min_p", 0.0, 1.0),
    "repetition_penalty": ("repetition_penalty", "penalty_repeat", 0.01, 10.0),
    "max_tokens": ("max_new_tokens", "", 1, 2**31 - 1),
}
_WHOLE: Final = ("top_k", "max_tokens")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What holds for a request that leaves it out; None: the API's own default. `source` says where it is from."""

    source: str = ""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def given(self) -> dict[str, float | int]:
        """The values that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "source"}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.given().items())


NONE: Final = GenerationDefaults()


def from_generation_config(raw: Mapping[str, Any]) -> GenerationDefaults:
    """The defaults that generation_config.json, `raw`, gives; `do_sample: false` is temperature 0.

    Raises CheckpointError for a value that is not a number or is out of range.
    """
    found = {name: raw.get(keys[0]) for name, keys in _KEYS.items()}
    if raw.get("do_sample") is False:
        found["temperature"] = 0.0
    return _checked(GENERATION_CONFIG, found, {name: keys[0] for name, keys in _KEYS.items()})


def from_gguf(metadata: Mapping[str, Any]) -> GenerationDefaults:
    """The defaults that a GGUF file's metadata give. Raises CheckpointError as `from_generation_config`."""
    labels = {name: f"{GGUF_PREFIX}.{keys[1]}" for name, keys in _KEYS.items() if keys[1]}
    return _checked(f"{GGUF_PREFIX}.*", {name: metadata.get(label) for name, label in labels.items()}, labels)


def _checked(source: str, found: Mapping[str, Any], labels: Mapping[str, str]) -> GenerationDefaults:
    values: dict[str, Any] = {}
    for name, given in found.items():
        # -1 is one way to write "all".
        value = 0 if name == "top_k" and given == -1 else given
        if value is None:
            continue
        label = labels[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{source}: {label} must be a number, but {value!r} was given")
        _, _, low, high = _KEYS[name]
        if not low <= value <= high:
            raise CheckpointError(f"{source}: {label} must lie in [{low:g}, {high:g}], but {value!r} was given")
        values[name] = int(value) if name in _WHOLE else _short(float(value))
    return GenerationDefaults(source, **values) if values else NONE


def _short(value: float) -> float:
    # A GGUF file holds 32-bit floats: 0.2 is there as 0.20000000298023224.
    return float(f"{value:.6g}")
