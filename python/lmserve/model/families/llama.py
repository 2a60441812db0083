"""Llama 2 and 3, SmolLM2, and Mistral."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.hf_config import decoder_config


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    return decoder_config(
        "llama", raw, attention_bias=bias, output_bias=bias, mlp_bias=bool(raw.get("mlp_bias", False))
    )


FAMILY = Family(
    name="llama",
    kind="generate",
    hf_architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    hf_config=_hf_config,
    gguf_architecture="llama",
    gguf_interleaved_rope=True,
)
