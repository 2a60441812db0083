"""Mistral Small 4: DeepSeek-V3's latent attention with queries that are scaled up with their position, and experts
chosen by a softmax beside a network that every token passes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmserve.model.errors import CheckpointError
from lmserve.model.families.deepseek_v3 import DeepseekV3, LatentConfig, gguf_latent_config, hf_tensors, latent_fields
from lmserve.model.families.expert_tensors import GGUF_NAMES
from lmserve.model.families.family import Family
from lmserve.model.families.fields import hf_fields
from lmserve.model.families.glm4_moe import experts_fields
from lmserve.model.families.latent_tensors import GGUF_NAMES as LATENT_NAMES
from lmserve.model.gguf_source import GgufModel

DEFAULTS: dict[str, Any] = {
    "kv_lora_rank": 256,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}


def _hf_config(raw: dict[str, Any]) -> LatentConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None or key == "q_lora_rank"}
    if int(raw["n_group"]) != 1:
        raise CheckpointError(f"config.json: n_group of mistral4 must be 1, but {raw['n_group']!r} was given")
    # The rotated share of a head is qk_rope_head_dim, which partial_rotary_factor says once more.
    rope = {key: value for key, value in raw["rope_parameters"].items() if key != "partial_rotary_factor"}
    raw |= {"rope_parameters": rope, "head_dim": raw["qk_rope_head_dim"]}
    fields = hf_fields("mistral4", raw)
    experts = experts_fields(raw, fields["num_layers"])
    config = LatentConfig(**latent_fields(fields, raw), **experts)
    return _with_softmax(config, float(rope.get("llama_4_scaling_beta") or 0.0))


def _gguf_config(file: GgufModel) -> LatentConfig:
    return _with_softmax(gguf_latent_config(file, "mistral4"), float(file.value("attention.temperature_scale", 0.0)))


def _with_softmax(config: LatentConfig, beta: float) -> LatentConfig:
    """`config` with a softmax router; where beta is not 0, queries scaled by their position."""
    router = replace(config.router, kind="softmax")
    if not beta:
        return replace(config, router=router)
    temperature = (beta, config.rope.original_context_length)
    layers = (replace(layer, temperature=temperature) for layer in config.attention)
    return replace(config, router=router, attention=tuple(layers))


FAMILY = Family(
    name="mistral4",
    kind="generate",
    hf_architectures=("Mistral4ForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=hf_tensors,
    decoder=DeepseekV3,
    gguf_architecture="mistral4",
    gguf_config=_gguf_config,
    gguf_names={**GGUF_NAMES, **LATENT_NAMES},
    gguf_tensors=hf_tensors,
)
