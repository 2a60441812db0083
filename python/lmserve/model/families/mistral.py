"""Mistral 7B and Small 3.x, Codestral, Devstral: Llama with a head_dim of its own, and at first a window."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, hf_fields, hf_windows
from lmserve.model.families.llama import Llama

DEFAULTS: dict[str, Any] = {"num_key_value_heads": 8, "sliding_window": 4096}


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    fields = hf_fields("mistral", DEFAULTS | raw)
    return ModelConfig(**fields, attention=attention_layers(fields, windows=hf_windows(DEFAULTS | raw)))


FAMILY = Family(
    name="mistral",
    kind="generate",
    hf_architectures=("MistralForCausalLM",),
    hf_config=_hf_config,
    decoder=Llama,
)
