"""Qwen3: Llama with an RMS norm on each head's q and k, and a head_dim of its own."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.llama import Llama
from lmserve.model.hf_config import decoder_config


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    return decoder_config("qwen3", raw, attention_bias=bias, output_bias=bias, qk_norm=True, default_head_dim=128)


FAMILY = Family(
    name="qwen3",
    kind="generate",
    hf_architectures=("Qwen3ForCausalLM",),
    hf_config=_hf_config,
    decoder=Llama,
    gguf_architecture="qwen3",
)
