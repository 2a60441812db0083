"""GTE encoders (gte-multilingual-base, gte-base and -large-en-v1.5, snowflake-arctic-embed-m-v2.0), as Nomic BERT's."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import EncoderConfig, RopeConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.encoder_fields import encoder_config, renamed, segment_rows, split
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.nomic_bert import TYPES, RotaryBert
from lmserve.model.hf_config import required
from lmserve.model.rope_config import rope_of
from lmserve.model.score_head import scores_pairs

THETA = 160_000.0
# What the publisher's code can do besides.
REFUSED = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
    "pack_qkv": True,
}
NAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.(qkv_proj|o_proj)\.", r".self_attn.\1."),
    (r"\.attn_ln\.", ".post_attention_layernorm."),
    (r"\.mlp_ln\.", ".post_mlp_layernorm."),
)


def _hf_config(raw: dict[str, Any]) -> EncoderConfig:
    for key, value in REFUSED.items():
        if raw.get(key) is not None and raw[key] != value:
            raise CheckpointError(f"config.json: {key} {raw[key]!r} is not supported ({value!r} is)")
    context, layers = int(required(raw, "max_position_embeddings")), int(required(raw, "num_hidden_layers"))
    head_dim = int(required(raw, "hidden_size")) // max(1, int(required(raw, "num_attention_heads")))
    types = int(raw.get("type_vocab_size", 1))
    return encoder_config(
        "gte",
        raw,
        context_length=context,
        ropes=[_rope(raw, head_dim, context)] * layers,
        num_segments=None if types == 0 else min(2, types) if scores_pairs(raw) else 1,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def _rope(raw: dict[str, Any], head_dim: int, context: int) -> RopeConfig:
    scaling = raw.get("rope_scaling")
    if not isinstance(scaling, dict) or (scaling.get("type") or scaling.get("rope_type")) != "ntk":
        return rope_of(raw, head_dim=head_dim, context_length=context, default_theta=THETA)
    # The publisher's: a larger theta, and all frequencies divided besides.
    if scaling.get("mixed_b") is not None:
        raise CheckpointError("config.json: mixed_b of rope_scaling is not supported")
    factor = float(required(scaling, "factor"))
    if not 1 <= factor < 1e6:
        raise CheckpointError(f"config.json: the factor of rope_scaling must lie in [1, 1000000), but is {factor}")
    divisor = factor ** (2 / head_dim)
    return RopeConfig(
        theta=float(raw.get("rope_theta", 10000.0)) * factor, frequency_factors=(divisor,) * (head_dim // 2)
    )


def _hf_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    found = split(renamed(tensors, "new|gte", NAMES), "qkv_proj", ("q_proj", "k_proj", "v_proj"))
    found = split(found, "up_gate_proj", ("up_proj", "gate_proj"))
    return found if config.num_segments is None else found | {TYPES: segment_rows(found, TYPES, config)}


FAMILY = Family(
    name="gte",
    kind="embed",
    hf_architectures=tuple(
        f"{name}{what}" for name in ("New", "Gte") for what in ("Model", "ForMaskedLM", "ForSequenceClassification")
    ),
    hf_config=_hf_config,
    decoder=RotaryBert,
    hf_tensors=_hf_tensors,
)
