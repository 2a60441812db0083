"""Llama 2 and 3, SmolLM2, and the many that are like them."""

from __future__ import annotations

from typing import Any, TypeVar

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, gguf_fields, gguf_windows, hf_fields
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import load_gated_mlp
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer

A = TypeVar("A")
W = TypeVar("W")


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        **hf_fields("llama", raw),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def gguf_config(file: GgufModel) -> ModelConfig:
    """Of Llama and its like; which biases and norms there are is read off the tensors, as GGUF has no key for it."""
    fields = gguf_fields(file.architecture, file)
    return ModelConfig(
        **fields,
        attention=attention_layers(fields, windows=gguf_windows(file, period=0)),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
    )


class Llama(PreNormDecoder[A, W]):
    """Attention and a gated feed-forward network."""

    def __init__(self, config: ModelConfig, load: Loader[A, W]) -> None:
        super().__init__(config, load, llama_layer)


def llama_layer(config: ModelConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    """The weights of a layer under the names that most checkpoints have."""
    hidden, eps = config.hidden_size, config.norm_eps
    return PreNormLayer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
            qk_norm_eps=eps if config.qk_norm else None,
        ),
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=load_gated_mlp(load.within("mlp"), hidden, config.intermediate_size, bias=config.mlp_bias),
    )


FAMILY = Family(
    name="llama",
    kind="generate",
    hf_architectures=("LlamaForCausalLM",),
    hf_config=_hf_config,
    decoder=Llama,
    gguf_architecture="llama",
    gguf_config=gguf_config,
    gguf_interleaved_rope=True,
)
