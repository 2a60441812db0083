"""Granite 3 to 4.1 (dense): Llama with constants that multiply embeddings, scores, what is added to the residual
states, and logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, gguf_fields, hf_fields
from lmserve.model.families.llama import llama_layer
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.pre_norm import PreNormDecoder

A = TypeVar("A")
W = TypeVar("W")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraniteConfig(ModelConfig):
    """The constants that Llama does not have."""

    embedding_multiplier: float
    residual_multiplier: float


def _hf_config(raw: dict[str, Any]) -> GraniteConfig:
    fields = hf_fields("granite", raw)
    bias = bool(raw.get("attention_bias", False))
    return GraniteConfig(
        **fields,
        attention=attention_layers(fields, scale=float(raw.get("attention_multiplier", 1.0))),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        logits_scale=1 / float(raw.get("logits_scaling", 1.0)),
        embedding_multiplier=float(raw.get("embedding_multiplier", 1.0)),
        residual_multiplier=float(raw.get("residual_multiplier", 1.0)),
    )


def _gguf_config(file: GgufModel) -> GraniteConfig:
    fields = gguf_fields("granite", file)
    # Without a scale llama.cpp takes that of all models.
    scale = float(file.value("attention.scale", 0.0)) or None
    return GraniteConfig(
        **fields,
        attention=attention_layers(fields, scale=scale),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        logits_scale=1 / float(file.value("logit_scale")),
        embedding_multiplier=float(file.value("embedding_scale", 0.0)) or 1.0,
        residual_multiplier=float(file.value("residual_scale", 0.0)) or 1.0,
    )


class Granite(PreNormDecoder[A, W]):
    """Llama's layers; what each gives is scaled before it is added to the residual states."""

    def __init__(self, config: GraniteConfig, load: Loader[A, W]) -> None:
        super().__init__(
            config,
            load,
            llama_layer,
            embedding_scale=config.embedding_multiplier,
            residual_scale=config.residual_multiplier,
        )


FAMILY = Family(
    name="granite",
    kind="generate",
    hf_architectures=("GraniteForCausalLM",),
    hf_config=_hf_config,
    decoder=Granite,
    gguf_architecture="granite",
    gguf_config=_gguf_config,
    gguf_interleaved_rope=True,
)
