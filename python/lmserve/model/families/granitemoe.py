"""Granite 3 with experts (1B-A400M, 3B-A800M): Granite's constants, and experts in every layer, in some models with a
network beside them that every token passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lmserve.model.families.expert_tensors import GGUF_NAMES, renamed, stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import attention_layers, gguf_fields, hf_fields
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.experts import Experts, ExpertSizes, load_experts, load_router
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import load_gated_mlp
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import SparseConfig

A = TypeVar("A")
W = TypeVar("W")

NAMES = {
    ".block_sparse_moe.input_linear.weight": ".mlp.experts.gate_up_proj",
    ".block_sparse_moe.output_linear.weight": ".mlp.experts.down_proj",
    ".block_sparse_moe.router.layer.": ".mlp.gate.",
    ".block_sparse_moe.router.": ".mlp.gate.",
    ".block_sparse_moe.": ".mlp.",
    ".shared_mlp.output_linear.": ".mlp.shared_experts.down_proj.",
}
SHARED_INPUT = ".shared_mlp.input_linear.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraniteMoeConfig(SparseConfig):
    """The constants that others do not have."""

    embedding_multiplier: float
    residual_multiplier: float


def _hf_config(raw: dict[str, Any]) -> GraniteMoeConfig:
    raw = {"num_local_experts": 8, "num_experts_per_tok": 2} | raw
    fields = hf_fields("granitemoe", raw)
    bias = bool(raw.get("attention_bias", False))
    return GraniteMoeConfig(
        **fields,
        attention=attention_layers(fields, scale=float(raw.get("attention_multiplier", 1.0))),
        attention_bias=bias,
        output_bias=bias,
        logits_scale=1 / float(raw.get("logits_scaling", 1.0)),
        embedding_multiplier=float(raw.get("embedding_multiplier", 1.0)),
        residual_multiplier=float(raw.get("residual_multiplier", 1.0)),
        num_experts=experts_of(raw, "num_local_experts"),
        expert_size=fields["intermediate_size"],
        router=Router("softmax_of_chosen", int(raw["num_experts_per_tok"])),
        sparse=(True,) * fields["num_layers"],
        shared_size=int(raw.get("shared_intermediate_size") or 0) or None,
    )


def _gguf_config(file: GgufModel) -> GraniteMoeConfig:
    fields = gguf_fields("granitemoe", file, experts=True)
    # Without a scale llama.cpp takes that of all models.
    scale = float(file.value("attention.scale", 0.0)) or None
    return GraniteMoeConfig(
        **fields,
        attention=attention_layers(fields, scale=scale),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        logits_scale=1 / float(file.value("logit_scale")),
        embedding_multiplier=float(file.value("embedding_scale", 0.0)) or 1.0,
        residual_multiplier=float(file.value("residual_scale", 0.0)) or 1.0,
        num_experts=int(file.value("expert_count")),
        expert_size=int(file.value("expert_feed_forward_length", fields["intermediate_size"])),
        router=Router("softmax_of_chosen", int(file.value("expert_used_count"))),
        sparse=(True,) * fields["num_layers"],
        shared_size=int(file.value("expert_shared_feed_forward_length", 0)) or None,
    )


def _tensors(tensors: Tensors, config: GraniteMoeConfig) -> Tensors:
    return granite_tensors(tensors, config.num_experts)


def granite_tensors(tensors: Tensors, experts: int) -> Tensors:
    """The tensors under the names of `mlp` that are loaded: `gate`, `experts` and `shared_experts`."""
    found = stacked(renamed(tensors, NAMES), experts)
    for name in [name for name in found if name.endswith(SHARED_INPUT)]:
        both, prefix = found.pop(name), name.removesuffix(SHARED_INPUT)
        half = both.shape[0] // 2
        found[f"{prefix}.mlp.shared_experts.gate_proj.weight"] = both.select_rows(np.arange(half))
        found[f"{prefix}.mlp.shared_experts.up_proj.weight"] = both.select_rows(np.arange(half, 2 * half))
    return found


class GraniteMoe(PreNormDecoder[A, W]):
    """Attention, then experts; what each gives is scaled before it is added to the residual states."""

    def __init__(self, config: GraniteMoeConfig, load: Loader[A, W]) -> None:
        super().__init__(
            config,
            load,
            _layer,
            embedding_scale=config.embedding_multiplier,
            residual_scale=config.residual_multiplier,
        )


def _layer(config: GraniteMoeConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps, mlp = config.hidden_size, config.norm_eps, load.within("mlp")
    shared = None
    if config.shared_size is not None:
        shared = load_gated_mlp(mlp.within("shared_experts"), hidden, config.shared_size)
    sizes = ExpertSizes(config.num_experts, config.expert_size)
    return PreNormLayer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
        ),
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=Experts(
            router=load_router(mlp, "gate", config.router, config.num_experts, hidden),
            experts=load_experts(mlp.within("experts"), sizes, hidden, config.activation),
            shared=shared,
            activation=config.activation,
        ),
    )


FAMILY = Family(
    name="granitemoe",
    kind="generate",
    hf_architectures=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    hf_config=_hf_config,
    hf_tensors=_tensors,
    decoder=GraniteMoe,
    gguf_architecture="granitemoe",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_tensors,
    gguf_interleaved_rope=True,
)
