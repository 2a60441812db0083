"""StarCoder 2: layer norms, biases everywhere, and a feed-forward network without a gate."""

from __future__ import annotations

from typing import Any, TypeVar

from lmserve.model.activation import GELU_TANH
from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, gguf_fields, gguf_windows, hf_fields, hf_windows
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import load_plain_mlp
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer

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


class StarCoder2(PreNormDecoder[A, W]):
    """Attention and a feed-forward network without a gate."""

    def __init__(self, config: ModelConfig, load: Loader[A, W]) -> None:
        norm = load.layer_norm("model.norm", config.hidden_size, config.norm_eps, bias=True)
        super().__init__(config, load, _layer, norm=norm)


def _layer(config: ModelConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return PreNormLayer(
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
