"""StarCoder 2: layer norms, biases everywhere, and a feed-forward network without a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.activation import GELU_TANH
from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, gguf_fields, gguf_windows, hf_fields, hf_windows
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import PlainMlp, load_plain_mlp, plain_mlp

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {"norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2}


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    raw = DEFAULTS | raw
    fields = hf_fields("starcoder2", raw, eps="norm_epsilon", tied=True)
    bias = bool(raw.get("use_bias", True))
    return ModelConfig(
        **fields,
        attention=attention_layers(fields, windows=hf_windows(raw)),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


def _gguf_config(file: GgufModel) -> ModelConfig:
    fields = gguf_fields("starcoder2", file, eps="layer_norm_epsilon") | {"activation": GELU_TANH}
    return ModelConfig(
        **fields,
        attention=attention_layers(fields, windows=gguf_windows(file, period=0)),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
    )


@dataclass(frozen=True, slots=True)
class StarCoder2Layer(Generic[W]):
    """Loaded weights of one layer."""

    input_norm: W
    attention: SelfAttention[W]
    mlp_norm: W
    mlp: PlainMlp[W]


class StarCoder2(Generic[A, W]):
    """Pre-norm attention and a plain feed-forward network, each added to the residual states."""

    def __init__(self, config: ModelConfig, load: Loader[A, W]) -> None:
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)
        ]
        self.norm = load.layer_norm("model.norm", hidden, config.norm_eps, bias=True)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops, activation = self.ops, self.config.activation
        states = ops.embed(self.embedding)
        normed = ops.norm(states, self.layers[0].input_norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            attended = attend(ops, normed, index, layer.attention)
            if last and sampled_rows_only:
                attended, states = ops.rows(attended), ops.rows(states)
            normed, states = ops.add_norm(ops.linear(attended, layer.attention.output), states, layer.mlp_norm)
            inner = plain_mlp(ops, normed, layer.mlp, activation)
            following = self.norm if last else self.layers[index + 1].input_norm
            normed, states = ops.add_norm(inner, states, following)
        return normed


def _layer(config: ModelConfig, index: int, load: Loader[A, W]) -> StarCoder2Layer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return StarCoder2Layer(
        input_norm=load.layer_norm("input_layernorm", hidden, eps, bias=True),
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
        ),
        mlp_norm=load.layer_norm("post_attention_layernorm", hidden, eps, bias=True),
        mlp=load_plain_mlp(
            load.within("mlp"), ("c_fc", "c_proj"), hidden, config.intermediate_size, bias=config.mlp_bias
        ),
    )


FAMILY = Family(
    name="starcoder2",
    kind="generate",
    hf_architectures=("Starcoder2ForCausalLM",),
    hf_config=_hf_config,
    decoder=StarCoder2,
    gguf_architecture="starcoder2",
    gguf_config=_gguf_config,
    gguf_names={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
)
