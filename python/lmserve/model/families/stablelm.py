"""StableLM 2 and 3B: Llama with layer norms, of whose heads a quarter is rotated."""

from __future__ import annotations

from typing import Any, TypeVar

from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family
from lmserve.model.families.fields import gguf_fields, hf_fields
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import load_gated_mlp
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5}


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    raw = DEFAULTS | raw
    for key in ("qk_layernorm", "use_parallel_residual"):
        if raw.get(key):
            raise CheckpointError(f"config.json: {key} (StableLM 2 12B) is not supported")
    return ModelConfig(
        **hf_fields("stablelm", raw, eps="layer_norm_eps"), attention_bias=bool(raw.get("use_qkv_bias", False))
    )


def _gguf_config(file: GgufModel) -> ModelConfig:
    if "blk.0.attn_q_norm.weight" in file.tensors or "blk.0.ffn_norm.weight" not in file.tensors:
        raise CheckpointError(
            f"{file.path}: norms of q and k, and attention beside the feed-forward network (StableLM 2 12B) are not"
            " supported"
        )
    fields = gguf_fields("stablelm", file, eps="layer_norm_epsilon")
    return ModelConfig(**fields, attention_bias="blk.0.attn_q.bias" in file.tensors)


class StableLm(PreNormDecoder[A, W]):
    """Attention and a gated feed-forward network."""

    def __init__(self, config: ModelConfig, load: Loader[A, W]) -> None:
        norm = load.layer_norm("model.norm", config.hidden_size, config.norm_eps, bias=True)
        super().__init__(config, load, _layer, norm=norm)


def _layer(config: ModelConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return PreNormLayer(
        input_norm=load.layer_norm("input_layernorm", hidden, eps, bias=True),
        attention=load_self_attention(
            load.within("self_attn"), config.attention[index], hidden, bias=config.attention_bias
        ),
        mlp_norm=load.layer_norm("post_attention_layernorm", hidden, eps, bias=True),
        mlp=load_gated_mlp(load.within("mlp"), hidden, config.intermediate_size),
    )


FAMILY = Family(
    name="stablelm",
    kind="generate",
    hf_architectures=("StableLmForCausalLM",),
    hf_config=_hf_config,
    decoder=StableLm,
    limits="StableLM 2 12B: norms of each head of its own, attention beside the feed-forward network",
    gguf_architecture="stablelm",
    gguf_config=_gguf_config,
)
