"""Qwen3: Llama with an RMS norm on each head's q and k, and a head_dim of its own."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, hf_fields
from lmserve.model.families.llama import Llama, gguf_config
from lmserve.model.families.qwen2 import qwen_windows


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    fields = hf_fields("qwen3", {"head_dim": 128} | raw)
    return ModelConfig(
        **fields,
        attention=attention_layers(fields, windows=qwen_windows(raw)),
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


FAMILY = Family(
    name="qwen3",
    kind="generate",
    hf_architectures=("Qwen3ForCausalLM",),
    hf_config=_hf_config,
    decoder=Llama,
    gguf_architecture="qwen3",
    gguf_config=gguf_config,
)
