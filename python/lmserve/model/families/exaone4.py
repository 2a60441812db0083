"""EXAONE 4: as OLMo 2, with norms of each head's q and k; beside layers with a window, those without do not rotate."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, gguf_fields, gguf_windows, hf_fields, hf_windows
from lmserve.model.families.olmo2 import GGUF_NAMES, Olmo2
from lmserve.model.gguf_source import GgufModel

DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-5, "sliding_window": 4096}
PERIOD = 4
# The layers of the 32B model: the only one with windows.
LARGE = 64


def _attention(fields: dict[str, Any], windows: list[int | None], *, hybrid: bool) -> dict[str, Any]:
    ropes = [None if hybrid and window is None else fields["rope"] for window in windows]
    return {"attention": attention_layers(fields, windows=windows, ropes=ropes), "qk_norm": True}


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    raw = DEFAULTS | raw
    fields = hf_fields("exaone4", raw)
    pattern = raw.get("sliding_window_pattern")
    if isinstance(pattern, str):
        if raw.get("layer_types") is None:
            raise CheckpointError(f"config.json: sliding_window_pattern {pattern!r} is only supported with layer_types")
        pattern = None
    windows = hf_windows(raw, period=int(pattern or PERIOD))
    return ModelConfig(**fields, **_attention(fields, windows, hybrid=raw["sliding_window"] is not None))


def _gguf_config(file: GgufModel) -> ModelConfig:
    fields = gguf_fields("exaone4", file)
    pattern = isinstance(file.value("attention.sliding_window_pattern", 0), list)
    hybrid = bool(file.value("attention.sliding_window", 0)) and (pattern or fields["num_layers"] == LARGE)
    windows: list[int | None] = [None] * fields["num_layers"]
    if hybrid:
        windows = gguf_windows(file, period=PERIOD)
    return ModelConfig(**fields, **_attention(fields, windows, hybrid=hybrid))


FAMILY = Family(
    name="exaone4",
    kind="generate",
    hf_architectures=("Exaone4ForCausalLM",),
    hf_config=_hf_config,
    decoder=Olmo2,
    gguf_architecture="exaone4",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
)
