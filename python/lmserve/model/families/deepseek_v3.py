"""DeepSeek-V3 and R1, Kimi K2: latent attention; a few dense layers, then experts chosen by corrected scores in groups,
and a network beside them that every token passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lmserve.model.config import AttentionLayer, RopeConfig
from lmserve.model.families.expert_tensors import GGUF_NAMES, stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import gguf_fields, hf_fields
from lmserve.model.families.glm4_moe import (
    experts_fields,
    gguf_experts_fields,
    load_feed_forward,
    without_further_tokens,
)
from lmserve.model.families.latent_tensors import GGUF_NAMES as LATENT_NAMES
from lmserve.model.families.latent_tensors import latent_tensors
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.latent_attention import LatentSizes, load_latent_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer
from lmserve.model.rope_config import rope_of
from lmserve.model.sparse_config import SparseConfig

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_interleave": True,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
# llama.cpp's numbers of expert_gating_func.
SOFTMAX, SIGMOID = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig(SparseConfig):
    """`sizes` of latent attention; `interleaved`: rotated pairs are adjacent in the stored tensors."""

    sizes: LatentSizes
    interleaved: bool


def _hf_config(raw: dict[str, Any]) -> LatentConfig:
    given = {key: value for key, value in raw.items() if value is not None or key == "q_lora_rank"}
    raw = DEFAULTS | given
    fields = hf_fields("deepseek_v3", raw | {"head_dim": raw["qk_rope_head_dim"]})
    return LatentConfig(**latent_fields(fields, raw), **experts_fields(raw, fields["num_layers"]))


def latent_fields(fields: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """`fields` with those of latent attention, by the keys that DeepSeek-V2 gave them."""
    rank = raw["q_lora_rank"]
    sizes = LatentSizes(
        heads=fields["num_heads"],
        rank=int(raw["kv_lora_rank"]),
        nope=int(raw["qk_nope_head_dim"]),
        rope=int(raw["qk_rope_head_dim"]),
        value=int(raw["v_head_dim"]),
        query_rank=None if rank is None else int(rank),
    )
    rope = rope_of(raw, head_dim=sizes.rope, context_length=fields["context_length"])
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    all_dims = float(scaling.get("mscale_all_dim") or 0) if rope.kind == "yarn" else 0.0
    return _with_latents(fields, sizes, rope, all_dims, interleaved=bool(raw["rope_interleave"])) | {
        "attention_bias": bool(raw.get("attention_bias", False))
    }


def _with_latents(
    fields: dict[str, Any], sizes: LatentSizes, rope: RopeConfig, all_dims: float, *, interleaved: bool
) -> dict[str, Any]:
    mscale = 1 + 0.1 * all_dims * math.log(rope.factor) if rope.factor > 1 else 1.0
    layer = AttentionLayer(
        sizes.heads,
        1,
        sizes.rank + sizes.rope,
        (sizes.nope + sizes.rope) ** -0.5 * mscale**2,
        rope,
        latent_rank=sizes.rank,
    )
    return fields | {
        "num_kv_heads": 1,
        "head_dim": layer.head_dim,
        "rope": rope,
        "attention": (layer,) * fields["num_layers"],
        "sizes": sizes,
        "interleaved": interleaved,
    }


def _gguf_config(file: GgufModel) -> LatentConfig:
    config = gguf_latent_config(file, "deepseek_v3")
    # Files of GLM-4.7-Flash say nothing of it. Only scores of a sigmoid are corrected.
    corrected = any(".exp_probs_b" in name for name in file.tensors)
    if int(file.value("expert_gating_func", SIGMOID if corrected else SOFTMAX)) == SIGMOID:
        return config
    return replace(config, router=replace(config.router, kind="grouped_softmax", normalized=False))


def gguf_latent_config(file: GgufModel, family: str) -> LatentConfig:
    """What a GGUF file says of latent attention, and of experts as if they were chosen by a sigmoid."""
    fields = gguf_fields(family, file, experts=True)
    fields["num_layers"] -= int(file.value("nextn_predict_layers", 0))
    rank, rope_size = int(file.value("attention.kv_lora_rank")), int(file.value("rope.dimension_count"))
    # Older files have the widths of heads where newer ones have those of latents.
    width = int(file.value("attention.key_length_mla", 0)) or int(file.value("attention.key_length"))
    sizes = LatentSizes(
        heads=fields["num_heads"],
        rank=rank,
        nope=width - rope_size,
        rope=rope_size,
        value=int(file.value("attention.value_length_mla", 0)) or int(file.value("attention.value_length")),
        query_rank=int(file.value("attention.q_lora_rank", 0)) or None,
    )
    # The converter writes a tenth of it.
    all_dims = 10 * float(file.value("rope.scaling.yarn_log_multiplier", 0.0))
    rope = replace(file.rope(rope_size), interleaved=False)
    if all_dims:
        # What the rotation would be scaled by is part of the scale of scores.
        rope = replace(rope, attention_factor=1.0)
    experts = gguf_experts_fields(file, fields["num_layers"])
    return LatentConfig(**_with_latents(fields, sizes, rope, all_dims, interleaved=True), **experts)


def hf_tensors(tensors: Tensors, config: LatentConfig) -> Tensors:
    """The tensors in the form that is loaded."""
    found = stacked(without_further_tokens(tensors, config.num_layers), config.num_experts)
    return latent_tensors(found, config.sizes, interleaved=config.interleaved)


def _gguf_tensors(tensors: Tensors, config: LatentConfig) -> Tensors:
    named = {name.replace(".e_score_correction.bias", ".e_score_correction_bias"): tensors[name] for name in tensors}
    return hf_tensors(named, config)


class DeepseekV3(PreNormDecoder[A, W]):
    """Latent attention, then experts and the network beside them; in the first layers one network alone."""

    def __init__(self, config: LatentConfig, load: Loader[A, W]) -> None:
        super().__init__(config, load, _layer)


def _layer(config: LatentConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return PreNormLayer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=load_latent_attention(load.within("self_attn"), config.sizes, hidden, bias=config.attention_bias),
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=load_feed_forward(config, index, load.within("mlp")),
    )


FAMILY = Family(
    name="deepseek_v3",
    kind="generate",
    hf_architectures=("DeepseekV3ForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=hf_tensors,
    decoder=DeepseekV3,
    gguf_architecture="deepseek2",
    gguf_config=_gguf_config,
    gguf_names={**GGUF_NAMES, **LATENT_NAMES},
    gguf_tensors=_gguf_tensors,
)
