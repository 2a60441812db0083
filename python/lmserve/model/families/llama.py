"""Llama 2 and 3, SmolLM2, and the many that are like them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, gguf_fields, gguf_windows, hf_fields
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, gated_mlp, load_gated_mlp

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


@dataclass(frozen=True, slots=True)
class LlamaLayer(Generic[W]):
    """Loaded weights of one layer."""

    input_norm: W
    attention: SelfAttention[W]
    mlp_norm: W
    mlp: GatedMlp[W]


class Llama(Generic[A, W]):
    """Pre-norm attention and a gated feed-forward network, each added to the residual states."""

    def __init__(self, config: ModelConfig, load: Loader[A, W]) -> None:
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)
        ]
        self.norm = load.rms_norm("model.norm", hidden, config.norm_eps)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops = self.ops
        states = ops.embed(self.embedding)
        normed = ops.norm(states, self.layers[0].input_norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            attended = attend(ops, normed, index, layer.attention)
            if last and sampled_rows_only:
                attended, states = ops.rows(attended), ops.rows(states)
            attended = ops.linear(attended, layer.attention.output)
            normed, states = ops.add_norm(attended, states, layer.mlp_norm)
            following = self.norm if last else self.layers[index + 1].input_norm
            normed, states = ops.add_norm(gated_mlp(ops, normed, layer.mlp, self.config.activation), states, following)
        return normed


def _layer(config: ModelConfig, index: int, load: Loader[A, W]) -> LlamaLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return LlamaLayer(
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
