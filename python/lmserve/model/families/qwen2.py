"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, hf_fields, hf_windows
from lmserve.model.families.llama import Llama, gguf_config


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    fields = hf_fields("qwen2", raw)
    return ModelConfig(**fields, attention=attention_layers(fields, windows=qwen_windows(raw)), attention_bias=True)


def qwen_windows(raw: dict[str, Any]) -> list[int | None]:
    """The windows of layer_types, or else of the layers from max_window_layers on; only where the model uses them."""
    raw = {"use_sliding_window": False, "sliding_window": 4096} | raw
    windows, first = hf_windows(raw), int(raw.get("max_window_layers") or 28)
    if raw.get("layer_types") is not None:
        return windows
    return [None if index < first else window for index, window in enumerate(windows)]


FAMILY = Family(
    name="qwen2",
    kind="generate",
    hf_architectures=("Qwen2ForCausalLM",),
    hf_config=_hf_config,
    decoder=Llama,
    gguf_architecture="qwen2",
    gguf_config=gguf_config,
)
