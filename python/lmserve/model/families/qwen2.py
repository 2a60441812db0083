"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.llama import Llama
from lmserve.model.hf_config import decoder_config


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    return decoder_config("qwen2", raw, attention_bias=True)


FAMILY = Family(
    name="qwen2",
    kind="generate",
    hf_architectures=("Qwen2ForCausalLM",),
    hf_config=_hf_config,
    decoder=Llama,
    gguf_architecture="qwen2",
)
