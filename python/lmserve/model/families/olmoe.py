"""OLMoE: Llama with an RMS norm on all heads' q and k, and experts in every layer."""

from __future__ import annotations

from typing import Any, TypeVar

from lmserve.model.errors import CheckpointError
from lmserve.model.families.expert_tensors import GGUF_NAMES, stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import gguf_fields, hf_fields
from lmserve.model.families.qwen3_moe import load_feed_forward
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import SparseConfig

A = TypeVar("A")
W = TypeVar("W")


def _hf_config(raw: dict[str, Any]) -> SparseConfig:
    raw = {"num_experts_per_tok": 8, "num_experts": 64, "rms_norm_eps": 1e-5} | raw
    if raw.get("clip_qkv") is not None:
        raise CheckpointError("config.json: clip_qkv is not supported")
    fields = hf_fields("olmoe", raw)
    bias = bool(raw.get("attention_bias", False))
    return SparseConfig(
        **fields,
        attention_bias=bias,
        output_bias=bias,
        num_experts=experts_of(raw, "num_experts"),
        expert_size=fields["intermediate_size"],
        router=Router("softmax", int(raw["num_experts_per_tok"]), normalized=bool(raw.get("norm_topk_prob", False))),
        sparse=(True,) * fields["num_layers"],
    )


def _gguf_config(file: GgufModel) -> SparseConfig:
    fields = gguf_fields("olmoe", file, experts=True)
    return SparseConfig(
        **fields,
        num_experts=int(file.value("expert_count")),
        expert_size=int(file.value("expert_feed_forward_length", fields["intermediate_size"])),
        # llama.cpp never divides these weights by their sum.
        router=Router("softmax", int(file.value("expert_used_count"))),
        sparse=(True,) * fields["num_layers"],
    )


def _tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    return stacked(tensors, config.num_experts)


class Olmoe(PreNormDecoder[A, W]):
    """Attention whose q and k are normed, all heads together, then experts."""

    def __init__(self, config: SparseConfig, load: Loader[A, W]) -> None:
        super().__init__(config, load, _layer)


def _layer(config: SparseConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return PreNormLayer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
            qk_norm_eps=eps,
            qk_norm_per_head=False,
        ),
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=load_feed_forward(config, index, load.within("mlp")),
    )


FAMILY = Family(
    name="olmoe",
    kind="generate",
    hf_architectures=("OlmoeForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_tensors,
    decoder=Olmoe,
    gguf_architecture="olmoe",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_tensors,
)
