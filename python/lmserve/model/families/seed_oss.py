"""Seed-OSS: Llama with biases on q, k and v, and a head_dim of its own."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import hf_fields
from lmserve.model.families.llama import Llama, gguf_config

DEFAULTS: dict[str, Any] = {"num_key_value_heads": 8, "head_dim": 128}


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        **hf_fields("seed_oss", DEFAULTS | raw),
        attention_bias=bool(raw.get("attention_bias", True)),
        output_bias=bool(raw.get("attention_out_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


FAMILY = Family(
    name="seed_oss",
    kind="generate",
    hf_architectures=("SeedOssForCausalLM",),
    hf_config=_hf_config,
    decoder=Llama,
    gguf_architecture="seed_oss",
    gguf_config=gguf_config,
    # Its second norm has the name that other families give to a norm after attention.
    gguf_names={"post_attention_norm": "post_attention_layernorm"},
)
