"""Nomic BERT (nomic-embed-text): BERT whose positions are rotated, with a gated feed-forward network."""

from __future__ import annotations

from typing import Any, TypeVar

from lmserve.model.config import EncoderConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.encoder_fields import encoder_config, gguf_sizes, renamed, segment_rows, split, within
from lmserve.model.families.family import Family, Tensors
from lmserve.model.gguf_source import GgufModel
from lmserve.model.hf_config import required
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp
from lmserve.model.layers.post_norm import PostNormEncoder, PostNormLayer
from lmserve.model.rope_config import rope_of
from lmserve.model.score_head import scores_pairs

A = TypeVar("A")
W = TypeVar("W")

THETA = 1000.0
# What config.json calls them in the publisher's own form.
KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
    "rotary_emb_base": "rope_theta",
}
# What the publisher's code can do besides, and no dense model of theirs does.
REFUSED = {
    "prenorm": False,
    "rotary_emb_interleaved": False,
    "rotary_emb_fraction": 1.0,
    "use_rms_norm": False,
    "parallel_block": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
}
# Of the publisher's form and then of transformers'.
NAMES = (
    (r"^emb_ln", "embeddings.LayerNorm"),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
    (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.fc11\.", ".up_proj."),
    (r"\.fc12\.", ".gate_proj."),
    (r"\.fc2\.", ".down_proj."),
    (r"\.norm1\.", ".post_attention_layernorm."),
    (r"\.norm2\.", ".post_mlp_layernorm."),
)
TYPES = "embeddings.token_type_embeddings.weight"


def _hf_config(raw: dict[str, Any]) -> EncoderConfig:
    if raw.get("num_experts") and raw.get("moe_every_n_layers"):
        raise CheckpointError("config.json: num_experts (nomic-embed-text-v2-moe) is not supported")
    for key, value in REFUSED.items():
        if raw.get(key) is not None and raw[key] != value:
            raise CheckpointError(f"config.json: {key} {raw[key]!r} is not supported ({value!r} is)")
    raw = {KEYS.get(key, key): value for key, value in raw.items()}
    if raw.get("hidden_act", "silu") == "swiglu":
        raw["hidden_act"] = "silu"
    context = int(required(raw, "max_position_embeddings"))
    if raw.get("rotary_scaling_factor"):
        # Longer texts are rotated otherwise, each length in its own way.
        context = min(context, int(raw.get("max_trained_positions") or 2048))
    layers = int(required(raw, "num_hidden_layers"))
    head_dim = int(required(raw, "hidden_size")) // max(1, int(required(raw, "num_attention_heads")))
    rope = rope_of(raw, head_dim=head_dim, context_length=context, default_theta=THETA)
    return encoder_config(
        "nomic_bert",
        {"hidden_act": "silu"} | raw,
        context_length=context,
        ropes=[rope] * layers,
        num_segments=min(2, int(raw.get("type_vocab_size", 2))) if scores_pairs(raw) else 1,
    )


def _hf_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    found = split(renamed(tensors, "nomic_bert|bert", NAMES), "qkv_proj", ("q_proj", "k_proj", "v_proj"))
    return found | {TYPES: segment_rows(found, TYPES, config)}


class RotaryBert(PostNormEncoder[A, W]):
    """Words and segments, if there are any; then layers with a gated feed-forward network."""

    def __init__(self, config: EncoderConfig, load: Loader[A, W]) -> None:
        segments = None if config.num_segments is None else ("token_type_embeddings", config.num_segments)
        super().__init__(config, load, segments, lambda index: _layer(config, index, load.within(f"layers.{index}")))


def _layer(config: EncoderConfig, index: int, load: Loader[A, W]) -> PostNormLayer[W]:
    hidden, inner, eps = config.hidden_size, config.intermediate_size, config.norm_eps
    mlp = load.within("mlp")
    return PostNormLayer(
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
        ),
        attention_norm=load.layer_norm("post_attention_layernorm", hidden, eps, bias=True),
        mlp=GatedMlp(
            gate_up=mlp.linear({"gate_proj": inner, "up_proj": inner}, hidden),
            down=mlp.linear({"down_proj": hidden}, inner, bias=config.mlp_bias),
        ),
        norm=load.layer_norm("post_mlp_layernorm", hidden, eps, bias=True),
    )


GGUF_NAMES = {
    "token_embd": "embeddings.word_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "token_types": "embeddings.token_type_embeddings",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output_norm": "post_attention_layernorm",
    "layer_output_norm": "post_mlp_layernorm",
}


def _gguf_config(file: GgufModel) -> EncoderConfig:
    sizes = gguf_sizes(file) | {"hidden_act": "silu"}
    rope = file.rope(sizes["hidden_size"] // max(1, sizes["num_attention_heads"]))
    layers = int(file.value("block_count"))
    return encoder_config("nomic_bert", sizes, context_length=int(file.value("context_length")), ropes=[rope] * layers)


def _gguf_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    return _hf_tensors(within(tensors, "layers."), config)


FAMILY = Family(
    name="nomic_bert",
    kind="embed",
    hf_architectures=("NomicBertModel", "NomicBertForMaskedLM", "NomicBertForSequenceClassification"),
    hf_config=_hf_config,
    decoder=RotaryBert,
    hf_tensors=_hf_tensors,
    limits="experts",
    gguf_architecture="nomic-bert",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_gguf_tensors,
)
