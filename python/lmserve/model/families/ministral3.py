"""Ministral 3: Llama with yarn, and queries that are scaled up with their position."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, gguf_fields, hf_fields, hf_windows
from lmserve.model.families.llama import Llama
from lmserve.model.gguf_source import GgufModel

DEFAULTS: dict[str, Any] = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    raw = DEFAULTS | raw
    fields = hf_fields("ministral3", raw, default_theta=1e6)
    beta = (raw.get("rope_parameters") or {}).get("llama_4_scaling_beta")
    temperature = (float(beta), fields["rope"].original_context_length) if beta else None
    return ModelConfig(**fields, attention=attention_layers(fields, windows=hf_windows(raw), temperature=temperature))


def _gguf_config(file: GgufModel) -> ModelConfig:
    fields = gguf_fields("ministral3", file)
    beta = float(file.value("attention.temperature_scale", 0.0))
    original = int(file.value("rope.scaling.original_context_length", fields["context_length"]))
    return ModelConfig(**fields, attention=attention_layers(fields, temperature=(beta, original) if beta else None))


FAMILY = Family(
    name="ministral3",
    kind="generate",
    hf_architectures=("Ministral3ForCausalLM",),
    hf_config=_hf_config,
    decoder=Llama,
    gguf_architecture="mistral3",
    gguf_config=_gguf_config,
    gguf_interleaved_rope=True,
)
