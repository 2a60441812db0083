"""Mixtral: Mistral with experts in every layer, of which each token passes two."""

from __future__ import annotations

from typing import Any, TypeVar

from lmserve.model.families.expert_tensors import GGUF_NAMES, renamed, stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import attention_layers, gguf_fields, gguf_windows, hf_fields, hf_windows
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
    fields = hf_fields("mixtral", raw, default_theta=1e6)
    return SparseConfig(
        **fields,
        attention=attention_layers(fields, windows=hf_windows(raw)),
        num_experts=experts_of({"num_local_experts": 8} | raw, "num_local_experts"),
        expert_size=fields["intermediate_size"],
        router=Router("softmax", int(raw.get("num_experts_per_tok", 2)), normalized=True),
        sparse=(True,) * fields["num_layers"],
    )


def _gguf_config(file: GgufModel) -> SparseConfig:
    fields = gguf_fields("mixtral", file, experts=True)
    return SparseConfig(
        **fields,
        attention=attention_layers(fields, windows=gguf_windows(file, period=0)),
        num_experts=int(file.value("expert_count")),
        expert_size=int(file.value("expert_feed_forward_length", fields["intermediate_size"])),
        router=Router("softmax", int(file.value("expert_used_count")), normalized=True),
        sparse=(True,) * fields["num_layers"],
    )


def _tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    return stacked(renamed(tensors, {".block_sparse_moe.": ".mlp."}), config.num_experts)


class Mixtral(PreNormDecoder[A, W]):
    """Attention, then experts."""

    def __init__(self, config: SparseConfig, load: Loader[A, W]) -> None:
        super().__init__(config, load, _layer)


def _layer(config: SparseConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return PreNormLayer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=load_self_attention(load.within("self_attn"), config.attention[index], hidden),
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=load_feed_forward(config, index, load.within("mlp")),
    )


FAMILY = Family(
    name="mixtral",
    kind="generate",
    hf_architectures=("MixtralForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_tensors,
    decoder=Mixtral,
    gguf_architecture="llama",
    gguf_experts=True,
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_tensors,
    gguf_interleaved_rope=True,
)
