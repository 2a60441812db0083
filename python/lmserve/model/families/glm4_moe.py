"""GLM-4.5 to 4.7: partly rotated heads, a dense layer or a few, then experts chosen by corrected scores, and a network
beside them that every token passes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from lmserve.model.families.expert_tensors import GGUF_NAMES, stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import gguf_fields, hf_fields
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
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# What GGUF calls the layers that predict further tokens beside those of all layers.
_FURTHER = re.compile(r"(blk\.\d+|model\.layers\.\d+)\.nextn\.")


def _hf_config(raw: dict[str, Any]) -> SparseConfig:
    given = {key: value for key, value in raw.items() if value is not None}
    raw = DEFAULTS | given
    fields = hf_fields("glm4_moe", raw)
    return SparseConfig(
        **fields,
        attention_bias=bool(raw.get("attention_bias", False)),
        qk_norm=bool(raw.get("use_qk_norm", False)),
        **experts_fields(raw, fields["num_layers"]),
    )


def experts_fields(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Fields of `SparseConfig` by the keys that GLM has from DeepSeek."""
    expert_size, dense = int(raw["moe_intermediate_size"]), int(raw["first_k_dense_replace"])
    return {
        "num_experts": experts_of(dict(raw), "n_routed_experts", "num_local_experts", "num_experts"),
        "expert_size": expert_size,
        "router": Router(
            "corrected_sigmoid",
            int(raw["num_experts_per_tok"]),
            factor=float(raw["routed_scaling_factor"]),
            normalized=bool(raw["norm_topk_prob"]),
            groups=int(raw["n_group"]),
            top_groups=int(raw["topk_group"]),
        ),
        "sparse": tuple(index >= dense for index in range(layers)),
        "shared_size": expert_size * int(raw["n_shared_experts"]) or None,
    }


def _gguf_config(file: GgufModel) -> SparseConfig:
    fields = gguf_fields("glm4_moe", file, experts=True)
    # The last blocks predict further tokens.
    fields["num_layers"] -= int(file.value("nextn_predict_layers", 0))
    return SparseConfig(
        **fields,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        **gguf_experts_fields(file, fields["num_layers"]),
    )


def gguf_experts_fields(file: GgufModel, layers: int) -> dict[str, Any]:
    """The same by the keys of a GGUF file."""
    expert_size = int(file.value("expert_feed_forward_length"))
    return {
        "num_experts": int(file.value("expert_count")),
        "expert_size": expert_size,
        "router": Router(
            "corrected_sigmoid",
            int(file.value("expert_used_count")),
            factor=float(file.value("expert_weights_scale", 1.0)) or 1.0,
            normalized=bool(file.value("expert_weights_norm", False)),
            groups=int(file.value("expert_group_count", 0)) or 1,
            top_groups=int(file.value("expert_group_used_count", 0)) or 1,
        ),
        "sparse": tuple(f"blk.{index}.ffn_gate_inp.weight" in file.tensors for index in range(layers)),
        "shared_size": expert_size * int(file.value("expert_shared_count", 0)) or None,
    }


def _hf_tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    return stacked(without_further_tokens(tensors, config.num_layers), config.num_experts)


def without_further_tokens(tensors: Tensors, layers: int) -> Tensors:
    """The tensors without those of layers that predict further tokens, which come after the others."""
    kept: Tensors = {}
    for name, tensor in tensors.items():
        layer = _LAYER.match(name)
        if not _FURTHER.match(name) and (layer is None or int(layer[1]) < layers):
            kept[name] = tensor
    return kept


def _gguf_tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    named = {name.replace(".e_score_correction.bias", ".e_score_correction_bias"): tensors[name] for name in tensors}
    return stacked(without_further_tokens(named, config.num_layers), config.num_experts)


class Glm4Moe(PreNormDecoder[A, W]):
    """Attention, then experts and the network beside them; in the first layers one network alone."""

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
            qk_norm_eps=eps if config.qk_norm else None,
        ),
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=load_feed_forward(config, index, load.within("mlp")),
    )


def load_feed_forward(config: SparseConfig, index: int, load: Loader[A, W]) -> GatedMlp[W] | Experts[W]:
    """A layer's experts and the network beside them, or its one network."""
    hidden = config.hidden_size
    if not config.sparse[index]:
        return load_gated_mlp(load, hidden, config.intermediate_size)
    shared = None
    if config.shared_size is not None:
        shared = load_gated_mlp(load.within("shared_experts"), hidden, config.shared_size)
    corrected = config.router.kind == "corrected_sigmoid"
    return Experts(
        router=load_router(
            load,
            "gate",
            config.router,
            config.num_experts,
            hidden,
            correction="gate.e_score_correction_bias" if corrected else None,
        ),
        experts=load_experts(
            load.within("experts"), ExpertSizes(config.num_experts, config.expert_size), hidden, config.activation
        ),
        shared=shared,
        activation=config.activation,
    )


FAMILY = Family(
    name="glm4_moe",
    kind="generate",
    hf_architectures=("Glm4MoeForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=Glm4Moe,
    gguf_architecture="glm4moe",
    gguf_config=_gguf_config,
    gguf_names={**GGUF_NAMES, "post_attention_norm": "post_attention_layernorm"},
    gguf_tensors=_gguf_tensors,
)
