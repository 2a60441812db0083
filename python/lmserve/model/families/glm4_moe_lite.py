"""GLM-4.7-Flash: DeepSeek-V3's latent attention, and GLM-4.5's experts. Its GGUF files are read as DeepSeek-V3's."""

from __future__ import annotations

from typing import Any

from lmserve.model.errors import CheckpointError
from lmserve.model.families.deepseek_v3 import DeepseekV3, LatentConfig, hf_tensors, latent_fields
from lmserve.model.families.family import Family
from lmserve.model.families.fields import hf_fields
from lmserve.model.families.glm4_moe import experts_fields

DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "rope_interleave": True,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
}


def _hf_config(raw: dict[str, Any]) -> LatentConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None or key == "q_lora_rank"}
    fields = hf_fields("glm4_moe_lite", raw | {"head_dim": raw["qk_rope_head_dim"]})
    experts = experts_fields(raw, fields["num_layers"])
    if raw.get("mlp_layer_types"):
        kinds = list(raw["mlp_layer_types"])
        if len(kinds) != fields["num_layers"] or not set(kinds) <= {"dense", "sparse"}:
            raise CheckpointError(
                f"config.json: each of {fields['num_layers']} mlp_layer_types must be dense or sparse"
            )
        experts["sparse"] = tuple(kind == "sparse" for kind in kinds)
    return LatentConfig(**latent_fields(fields, raw), **experts)


FAMILY = Family(
    name="glm4_moe_lite",
    kind="generate",
    hf_architectures=("Glm4MoeLiteForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=hf_tensors,
    decoder=DeepseekV3,
)
