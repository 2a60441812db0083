"""Nomic BERT (nomic-embed-text): BERT whose positions are rotated.

Its layers have a gated feed-forward network. In nomic-embed-text-v2-moe they have one without a gate, and every second
layer has experts in its place; a vector that all tokens share is added to what the experts make.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np

from lmserve.model.config import EncoderConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.expert_tensors import HeadsTensor
from lmserve.model.families.encoder_fields import encoder_config, gguf_sizes, renamed, segment_rows, split, within
from lmserve.model.families.family import Family, Tensors
from lmserve.model.gguf_source import GgufModel
from lmserve.model.hf_config import required
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.experts import Experts, ExpertSizes, load_experts, load_router
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, PlainMlp, load_plain_mlp
from lmserve.model.layers.post_norm import PostNormEncoder, PostNormLayer
from lmserve.model.rope_config import rope_of
from lmserve.model.router import Router, experts_of
from lmserve.model.score_head import scores_pairs
from lmserve.model.sparse_config import check_experts
from lmserve.model.tensors import StoredTensor

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
    "expert_choice_router": False,
    "num_shared_experts": 0,
}
# Linear layers have biases in models with experts alone.
BIASES = ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias")
# Of the publisher's form and then of transformers'.
NAMES = (
    (r"^emb_ln", "embeddings.LayerNorm"),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
    (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.fc11\.", ".up_proj."),
    (r"\.fc12\.", ".gate_proj."),
    (r"\.fc1\.", ".up_proj."),
    (r"\.fc2\.", ".down_proj."),
    (r"\.mlp\.router\.layer\.", ".mlp.gate."),
    (r"\.norm1\.", ".post_attention_layernorm."),
    (r"\.norm2\.", ".post_mlp_layernorm."),
)
TYPES = "embeddings.token_type_embeddings.weight"
# The vector that is added to what experts make, as the bias of a network of one number whose weights are zeros.
SHARED = ("shared.up_proj", "shared.down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class NomicMoeConfig(EncoderConfig):
    """Every layer whose index leaves a rest of 1 when divided by `every` has `num_experts`, chosen by `router`.

    shared_bias: a vector is added to what they make.
    """

    num_experts: int
    every: int
    router: Router
    shared_bias: bool

    def __post_init__(self) -> None:
        # A dataclass with slots is another class than the one that super() without arguments would look in.
        EncoderConfig.__post_init__(self)
        check_experts(self.num_experts, self.intermediate_size, None, self.router)
        if self.every < 1:
            raise CheckpointError(f"every {self.every} layers there are experts; it must be at least 1")

    def is_sparse(self, index: int) -> bool:
        """Whether the layer has experts."""
        return index % self.every == 1 % self.every


def _with_experts(config: EncoderConfig, **own: Any) -> NomicMoeConfig:
    return NomicMoeConfig(**{field.name: getattr(config, field.name) for field in fields(config)}, **own)


def _hf_config(raw: dict[str, Any]) -> EncoderConfig:
    sparse = bool(raw.get("num_experts") and raw.get("moe_every_n_layers"))
    for key, value in (REFUSED | dict.fromkeys(BIASES, sparse)).items():
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
    config = encoder_config(
        "nomic_bert",
        {"hidden_act": "silu"} | raw,
        context_length=context,
        ropes=[rope] * layers,
        num_segments=min(2, int(raw.get("type_vocab_size", 2))) if scores_pairs(raw) else 1,
        attention_bias=sparse,
        output_bias=sparse,
        mlp_bias=sparse,
    )
    if not sparse:
        return config
    normalized = bool(raw.get("moe_normalize_expert_weights", False))
    return _with_experts(
        config,
        num_experts=experts_of(raw, "num_experts"),
        every=int(raw["moe_every_n_layers"]),
        router=Router("softmax", int(raw.get("moe_top_k", 1)), normalized=normalized),
        shared_bias=True,
    )


def _hf_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    found = split(renamed(tensors, "nomic_bert|bert", NAMES), "qkv_proj", ("q_proj", "k_proj", "v_proj"))
    if isinstance(config, NomicMoeConfig):
        for index in filter(config.is_sparse, range(config.num_layers)):
            found |= _experts_of(found, f"layers.{index}.mlp.", config)
    return found | {TYPES: segment_rows(found, TYPES, config)}


def _experts_of(tensors: Tensors, mlp: str, config: NomicMoeConfig) -> Tensors:
    """A layer's experts, each under the rows of the one before it, and what is added to all."""
    count, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size
    found: Tensors = {}
    for name, part in (("w1", "up_proj"), ("w2", "down_proj")):
        whole = tensors.pop(f"{mlp}experts.mlp.{name}", None)
        if whole is None:
            continue
        if whole.shape != (count * inner, hidden):
            raise CheckpointError(
                f"tensor {whole.name} has shape {list(whole.shape)}, the configuration needs {[count * inner, hidden]}"
            )
        found[f"{mlp}experts.{part}.weight"] = HeadsTensor(whole, count, slice(0, inner), transposed=name == "w2")
    bias = tensors.pop(f"{mlp}experts.bias", None)
    if bias is not None:
        for part, shape in zip(SHARED, ((1, hidden), (hidden, 1)), strict=True):
            name = f"{mlp}{part}.weight"
            found[name] = StoredTensor(name, shape, "F32", np.zeros(shape, np.float32))
        found[f"{mlp}{SHARED[1]}.bias"] = bias
    return found


class RotaryBert(PostNormEncoder[A, W]):
    """Words and segments, if there are any; then layers with a gated feed-forward network."""

    def __init__(self, config: EncoderConfig, load: Loader[A, W]) -> None:
        segments = None if config.num_segments is None else ("token_type_embeddings", config.num_segments)
        super().__init__(config, load, segments, lambda index: _layer(config, index, load.within(f"layers.{index}")))


def _layer(config: EncoderConfig, index: int, load: Loader[A, W]) -> PostNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return PostNormLayer(
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
        ),
        attention_norm=load.layer_norm("post_attention_layernorm", hidden, eps, bias=True),
        mlp=_feed_forward(config, index, load.within("mlp")),
        norm=load.layer_norm("post_mlp_layernorm", hidden, eps, bias=True),
    )


def _feed_forward(config: EncoderConfig, index: int, load: Loader[A, W]) -> GatedMlp[W] | PlainMlp[W] | Experts[W]:
    hidden, inner = config.hidden_size, config.intermediate_size
    if not isinstance(config, NomicMoeConfig):
        return GatedMlp(
            gate_up=load.linear({"gate_proj": inner, "up_proj": inner}, hidden),
            down=load.linear({"down_proj": hidden}, inner, bias=config.mlp_bias),
        )
    if not config.is_sparse(index):
        return load_plain_mlp(load, ("up_proj", "down_proj"), hidden, inner, bias=True)
    up, down = SHARED
    sizes = ExpertSizes(config.num_experts, inner)
    return Experts(
        router=load_router(load, "gate", config.router, config.num_experts, hidden),
        experts=load_experts(load.within("experts"), sizes, hidden, config.activation, gate=False),
        shared=PlainMlp(up=load.linear({up: 1}, hidden), down=load.linear({down: hidden}, 1, bias=True))
        if config.shared_bias
        else None,
        activation=config.activation,
    )


MOE = "nomic-bert-moe"
GGUF_NAMES = {
    "token_embd": "embeddings.word_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "token_types": "embeddings.token_type_embeddings",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output_norm": "post_attention_layernorm",
    "layer_output_norm": "post_mlp_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


def _gguf_config(file: GgufModel) -> EncoderConfig:
    sparse = file.architecture == MOE
    sizes = gguf_sizes(file) | {"hidden_act": "gelu" if sparse else "silu"}
    rope = file.rope(sizes["hidden_size"] // max(1, sizes["num_attention_heads"]))
    config = encoder_config(
        "nomic_bert",
        sizes,
        context_length=int(file.value("context_length")),
        ropes=[rope] * int(file.value("block_count")),
        attention_bias=sparse,
        output_bias=sparse,
        mlp_bias=sparse,
    )
    if not sparse:
        return config
    return _with_experts(
        config,
        num_experts=int(file.value("expert_count")),
        every=int(file.value("moe_every_n_layers")),
        router=Router("softmax", int(file.value("expert_used_count"))),
        # llama.cpp's converter leaves it out.
        shared_bias=False,
    )


def _gguf_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    return _hf_tensors(within(tensors, "layers."), config)


DENSE = Family(
    name="nomic_bert",
    kind="embed",
    hf_architectures=("NomicBertModel", "NomicBertForMaskedLM", "NomicBertForSequenceClassification"),
    hf_config=_hf_config,
    decoder=RotaryBert,
    hf_tensors=_hf_tensors,
    gguf_architecture="nomic-bert",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_gguf_tensors,
)
# Of files alone: config.json calls both the same.
SPARSE = replace(DENSE, name="nomic_bert_moe", hf_architectures=(), gguf_architecture=MOE)
FAMILIES = (DENSE, SPARSE)
