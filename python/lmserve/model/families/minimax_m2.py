"""MiniMax M2: partly rotated heads, an RMS norm on all heads' q and k, and experts chosen by corrected scores."""

from __future__ import annotations

from typing import Any, TypeVar

from lmserve.model.families.expert_tensors import GGUF_NAMES, renamed, stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import gguf_fields, hf_fields
from lmserve.model.families.glm4_moe import load_feed_forward, without_further_tokens
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import SparseConfig

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {"head_dim": 128, "num_experts_per_tok": 8, "num_local_experts": 256}
NAMES = {
    ".block_sparse_moe.": ".mlp.",
    ".mlp.e_score_correction_bias": ".mlp.gate.e_score_correction_bias",
    ".e_score_correction.bias": ".e_score_correction_bias",
}


def _hf_config(raw: dict[str, Any]) -> SparseConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    if raw.get("rotary_dim") is not None:
        raw = {"partial_rotary_factor": int(raw["rotary_dim"]) / int(raw["head_dim"])} | raw
    fields = hf_fields("minimax_m2", raw, default_theta=5e6)
    return SparseConfig(
        **fields,
        num_experts=experts_of(raw, "num_local_experts"),
        expert_size=fields["intermediate_size"],
        router=Router("corrected_sigmoid", int(raw["num_experts_per_tok"]), normalized=True),
        sparse=(True,) * fields["num_layers"],
    )


def _gguf_config(file: GgufModel) -> SparseConfig:
    fields = gguf_fields("minimax_m2", file, experts=True)
    return SparseConfig(
        **fields,
        num_experts=int(file.value("expert_count")),
        expert_size=int(file.value("expert_feed_forward_length", fields["intermediate_size"])),
        router=Router("corrected_sigmoid", int(file.value("expert_used_count")), normalized=True),
        sparse=(True,) * fields["num_layers"],
    )


def _tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    return stacked(without_further_tokens(renamed(tensors, NAMES), config.num_layers), config.num_experts)


class MiniMaxM2(PreNormDecoder[A, W]):
    """Attention whose q and k are normed, all heads together, then experts."""

    def __init__(self, config: SparseConfig, load: Loader[A, W]) -> None:
        super().__init__(config, load, _layer)


def _layer(config: SparseConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return PreNormLayer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=load_self_attention(
            load.within("self_attn"), config.attention[index], hidden, qk_norm_eps=eps, qk_norm_per_head=False
        ),
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=load_feed_forward(config, index, load.within("mlp")),
    )


FAMILY = Family(
    name="minimax_m2",
    kind="generate",
    hf_architectures=("MiniMaxM2ForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_tensors,
    decoder=MiniMaxM2,
    gguf_architecture="minimax-m2",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_tensors,
)
