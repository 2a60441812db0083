"""DeepSeek-V2 and V2-Lite: latent attention; a dense layer, then experts chosen by a softmax, in V2 within groups, and
a network beside them that every token passes. Their GGUF files are read as DeepSeek-V3's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmserve.model.errors import CheckpointError
from lmserve.model.families.deepseek_v3 import DeepseekV3, LatentConfig, hf_tensors, latent_fields
from lmserve.model.families.family import Family
from lmserve.model.families.fields import hf_fields
from lmserve.model.families.glm4_moe import experts_fields

DEFAULTS: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_interleave": True,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
}


def _hf_config(raw: dict[str, Any]) -> LatentConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None or key == "q_lora_rank"}
    if raw.get("mlp_bias"):
        raise CheckpointError("config.json: mlp_bias is not supported")
    if raw["topk_method"] not in ("greedy", "group_limited_greedy"):
        given = raw["topk_method"]
        raise CheckpointError(f"config.json: topk_method is greedy or group_limited_greedy, but {given!r} was given")
    grouped = raw["topk_method"] == "group_limited_greedy"
    groups = {key: int(raw.get(key) or 1) if grouped else 1 for key in ("n_group", "topk_group")}
    fields = hf_fields("deepseek_v2", raw | {"head_dim": raw["qk_rope_head_dim"]})
    experts = experts_fields(raw | groups, fields["num_layers"])
    experts["router"] = replace(experts["router"], kind="grouped_softmax", normalized=False)
    return LatentConfig(**latent_fields(fields, raw), **experts)


FAMILY = Family(
    name="deepseek_v2",
    kind="generate",
    hf_architectures=("DeepseekV2ForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=hf_tensors,
    decoder=DeepseekV3,
)
