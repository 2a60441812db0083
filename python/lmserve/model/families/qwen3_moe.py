"""Qwen3 with experts (30B-A3B, Coder-30B-A3B, 235B-A22B): Qwen3's attention, and experts in most layers."""

from __future__ import annotations

from typing import Any, TypeVar

from lmserve.model.families.expert_tensors import GGUF_NAMES, stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import attention_layers, gguf_fields, hf_fields
from lmserve.model.families.qwen2 import qwen_windows
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.experts import Experts, ExpertSizes, load_experts, load_router
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, load_gated_mlp
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import SparseConfig

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
    "use_sliding_window": False,
}


def _hf_config(raw: dict[str, Any]) -> SparseConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    fields = hf_fields("qwen3_moe", raw)
    step, dense = int(raw["decoder_sparse_step"]), set(raw["mlp_only_layers"])
    bias = bool(raw.get("attention_bias", False))
    return SparseConfig(
        **fields,
        attention=attention_layers(fields, windows=qwen_windows(raw)),
        attention_bias=bias,
        output_bias=bias,
        num_experts=experts_of(raw, "num_experts", "num_local_experts"),
        expert_size=int(raw["moe_intermediate_size"]),
        router=Router("softmax", int(raw["num_experts_per_tok"]), normalized=bool(raw["norm_topk_prob"])),
        sparse=tuple(index not in dense and (index + 1) % step == 0 for index in range(fields["num_layers"])),
    )


def _gguf_config(file: GgufModel) -> SparseConfig:
    fields = gguf_fields("qwen3_moe", file, experts=True)
    return SparseConfig(
        **fields,
        num_experts=int(file.value("expert_count")),
        expert_size=int(file.value("expert_feed_forward_length", fields["intermediate_size"])),
        # llama.cpp divides the weights by their sum whatever the file says.
        router=Router("softmax", int(file.value("expert_used_count")), normalized=True),
        sparse=tuple(f"blk.{index}.ffn_gate_inp.weight" in file.tensors for index in range(fields["num_layers"])),
    )


def _tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    return stacked(tensors, config.num_experts)


class Qwen3Moe(PreNormDecoder[A, W]):
    """Attention with normed heads, then experts; a few layers may have one network in place of them."""

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
        ),
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=load_feed_forward(config, index, load.within("mlp")),
    )


def load_feed_forward(config: SparseConfig, index: int, load: Loader[A, W]) -> GatedMlp[W] | Experts[W]:
    """A layer's experts by the names of this family and those after it, or its one network."""
    hidden = config.hidden_size
    if not config.sparse[index]:
        return load_gated_mlp(load, hidden, config.intermediate_size)
    sizes = ExpertSizes(config.num_experts, config.expert_size)
    return Experts(
        router=load_router(load, "gate", config.router, config.num_experts, hidden),
        experts=load_experts(load.within("experts"), sizes, hidden, config.activation),
    )


FAMILY = Family(
    name="qwen3_moe",
    kind="generate",
    hf_architectures=("Qwen3MoeForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_tensors,
    decoder=Qwen3Moe,
    gguf_architecture="qwen3moe",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_tensors,
)
