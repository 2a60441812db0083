"""Granite 4 and 4 H: Granite's constants; Mamba-2 in place of attention in most layers of H, no rotation there, and
experts beside the network that every token passes, in some models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.expert_tensors import GGUF_NAMES as EXPERT_NAMES
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import gguf_fields, hf_fields, hybrid_layers
from lmserve.model.families.granitemoe import granite_tensors
from lmserve.model.families.recurrent_tensors import (
    MAMBA_NAMES,
    decay_tensors,
    mamba_state,
    mamba_tensors,
    time_step_limits,
)
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.experts import Experts, ExpertSizes, load_experts, load_router
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mamba2 import Mamba2, Mamba2Shape, load_mamba2, mamba2
from lmserve.model.layers.mlp import GatedMlp, load_gated_mlp
from lmserve.model.layers.pre_norm import feed_forward
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import check_experts

A = TypeVar("A")
W = TypeVar("W")

# The names of older configurations too.
ATTENTION, MAMBA = ("attention", "full_attention"), ("mamba", "linear_attention")
DEFAULTS: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 1024,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraniteHybridConfig(ModelConfig):
    """`shared_size`: width of the network that every token passes; num_experts None: there is nothing beside it."""

    embedding_multiplier: float
    residual_multiplier: float
    mamba: Mamba2Shape
    shared_size: int
    num_experts: int | None
    expert_size: int
    router: Router

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        if self.num_experts is not None:
            check_experts(self.num_experts, self.expert_size, self.shared_size, self.router)


def _hf_config(raw: dict[str, Any]) -> GraniteHybridConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    fields = hf_fields("granitemoehybrid", raw)
    layers = fields["num_layers"]
    types = raw.get("layer_types") or raw.get("layers_block_type") or [MAMBA[0]] * layers
    unknown = sorted({str(kind) for kind in types} - {*ATTENTION, *MAMBA})
    if unknown or len(types) != layers:
        given = f"{unknown[0]!r} is among them" if unknown else f"there are {len(types)}"
        raise CheckpointError(
            f"config.json: each of {layers} layer_types must be {' or '.join(MAMBA)}, or "
            f"{' or '.join(ATTENTION)}, but {given}"
        )
    shape = Mamba2Shape(
        groups=int(raw["mamba_n_groups"]),
        conv_bias=bool(raw["mamba_conv_bias"]),
        bias=bool(raw["mamba_proj_bias"]),
        limits=time_step_limits(raw),
    )
    state = mamba_state(
        shape,
        kernel=int(raw["mamba_d_conv"]),
        heads=int(raw["mamba_n_heads"]),
        rows=int(raw["mamba_d_state"]),
        inner=int(raw["mamba_expand"]) * fields["hidden_size"],
    )
    rotated = raw.get("position_embedding_type") == "rope"
    bias = bool(raw.get("attention_bias", False))
    hybrid = hybrid_layers(
        fields,
        [kind in MAMBA for kind in types],
        state,
        ropes=[fields["rope"] if rotated else None] * layers,
        scale=float(raw.get("attention_multiplier", 1.0)),
    )
    return GraniteHybridConfig(
        **fields | hybrid,
        attention_bias=bias,
        output_bias=bias,
        logits_scale=1 / float(raw.get("logits_scaling", 1.0)),
        embedding_multiplier=float(raw.get("embedding_multiplier", 1.0)),
        residual_multiplier=float(raw.get("residual_multiplier", 1.0)),
        mamba=shape,
        shared_size=int(raw["shared_intermediate_size"]),
        num_experts=None if raw["num_local_experts"] == 0 else experts_of(raw, "num_local_experts"),
        expert_size=fields["intermediate_size"],
        router=Router("softmax_of_chosen", int(raw["num_experts_per_tok"])),
    )


def _gguf_config(file: GgufModel) -> GraniteHybridConfig:
    fields = gguf_fields("granitemoehybrid", file, experts=True)
    layers = fields["num_layers"]
    kv_heads = file.value("attention.head_count_kv")
    recurrent = [not heads for heads in kv_heads] if isinstance(kv_heads, list) else [False] * layers
    shape = Mamba2Shape(
        groups=int(file.value("ssm.group_count")),
        conv_bias=any(name.endswith(".ssm_conv1d.bias") for name in file.tensors),
        bias=any(name.endswith(".ssm_in.bias") for name in file.tensors),
    )
    state = mamba_state(
        shape,
        kernel=int(file.value("ssm.conv_kernel")),
        heads=int(file.value("ssm.time_step_rank")),
        rows=int(file.value("ssm.state_size")),
        inner=int(file.value("ssm.inner_size")),
    )
    rotated = bool(file.value("rope.scaling.finetuned", True))
    hybrid = hybrid_layers(
        fields,
        recurrent,
        state,
        ropes=[fields["rope"] if rotated else None] * layers,
        # Without a scale llama.cpp takes that of all models.
        scale=float(file.value("attention.scale", 0.0)) or None,
    )
    experts = int(file.value("expert_count", 0)) or None
    inner = fields["intermediate_size"]
    return GraniteHybridConfig(
        **fields | hybrid,
        attention_bias=any(name.endswith(".attn_q.bias") for name in file.tensors),
        output_bias=any(name.endswith(".attn_output.bias") for name in file.tensors),
        logits_scale=1 / (float(file.value("logit_scale", 0.0)) or 1.0),
        embedding_multiplier=float(file.value("embedding_scale", 0.0)) or 1.0,
        residual_multiplier=float(file.value("residual_scale", 0.0)) or 1.0,
        mamba=shape,
        shared_size=int(file.value("expert_shared_feed_forward_length")) if experts is not None else inner,
        num_experts=experts,
        expert_size=int(file.value("expert_feed_forward_length", inner)),
        router=Router("softmax_of_chosen", int(file.value("expert_used_count", 1))),
    )


def _tensors(tensors: Tensors, config: GraniteHybridConfig) -> Tensors:
    mixers = mamba_tensors(decay_tensors(tensors), config, "mamba")
    found = granite_tensors(mixers, config.num_experts or 0)
    if config.num_experts is not None:
        return found
    return {name.replace(".mlp.shared_experts.", ".mlp."): tensor for name, tensor in found.items()}


@dataclass(frozen=True, slots=True)
class GraniteHybridLayer(Generic[W]):
    """Loaded weights of one layer; `place` is its entry of the configuration's `attention` or `recurrent`."""

    place: int
    input_norm: W
    mixer: SelfAttention[W] | Mamba2[W]
    mlp_norm: W
    mlp: GatedMlp[W] | Experts[W]


class GraniteHybrid(Generic[A, W]):
    """Attention or a mixer, then experts; what each gives is scaled before it is added to the residual states."""

    def __init__(self, config: GraniteHybridConfig, load: Loader[A, W]) -> None:
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)
        ]
        self.norm = load.rms_norm("model.norm", hidden, config.norm_eps)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops, config = self.ops, self.config
        scale = config.residual_multiplier
        states = ops.embed(self.embedding, config.embedding_multiplier)
        normed = ops.norm(states, self.layers[0].input_norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            if isinstance(layer.mixer, Mamba2):
                mixed = mamba2(ops, normed, layer.place, layer.mixer)
            else:
                mixed = attend(ops, normed, layer.place, layer.mixer)
            if last and sampled_rows_only:
                mixed, states = ops.rows(mixed), ops.rows(states)
            normed, states = ops.add_norm(ops.linear(mixed, layer.mixer.output), states, layer.mlp_norm, scale=scale)
            inner = feed_forward(ops, normed, layer.mlp, config.activation)
            following = self.norm if last else self.layers[index + 1].input_norm
            normed, states = ops.add_norm(inner, states, following, scale=scale)
        return normed


def _layer(config: GraniteHybridConfig, index: int, load: Loader[A, W]) -> GraniteHybridLayer[W]:
    hidden, eps, mlp = config.hidden_size, config.norm_eps, load.within("mlp")
    mixer: SelfAttention[W] | Mamba2[W]
    if index in config.attention_places:
        place = config.attention_places.index(index)
        mixer = load_self_attention(
            load.within("self_attn"),
            config.attention[place],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
        )
    else:
        place = index - sum(other < index for other in config.attention_places)
        mixer = load_mamba2(load.within("mamba"), config.recurrent[place], config.mamba, hidden, eps)
    return GraniteHybridLayer(
        place=place,
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        mixer=mixer,
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=_mlp(config, mlp),
    )


def _mlp(config: GraniteHybridConfig, load: Loader[A, W]) -> GatedMlp[W] | Experts[W]:
    hidden = config.hidden_size
    if config.num_experts is None:
        return load_gated_mlp(load, hidden, config.shared_size)
    sizes = ExpertSizes(config.num_experts, config.expert_size)
    return Experts(
        router=load_router(load, "gate", config.router, config.num_experts, hidden),
        experts=load_experts(load.within("experts"), sizes, hidden, config.activation),
        shared=load_gated_mlp(load.within("shared_experts"), hidden, config.shared_size),
        activation=config.activation,
    )


FAMILY = Family(
    name="granitemoehybrid",
    kind="generate",
    hf_architectures=("GraniteMoeHybridForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_tensors,
    decoder=GraniteHybrid,
    gguf_architecture="granitehybrid",
    gguf_config=_gguf_config,
    gguf_names=dict(EXPERT_NAMES) | {part: f"mamba.{name}" for part, name in MAMBA_NAMES.items()},
    gguf_tensors=_tensors,
    gguf_interleaved_rope=True,
)
