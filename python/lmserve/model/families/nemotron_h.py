"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: layers that are a Mamba-2 mixer, attention without rotation, a
feed-forward network without a gate or such experts, each behind a norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from lmserve.model.activation import RELU_SQUARED, named_activation
from lmserve.model.config import LARGEST, ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.expert_tensors import stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import attention_layers, gguf_fields, hf_fields
from lmserve.model.families.glm4_moe import without_further_tokens
from lmserve.model.families.recurrent_tensors import (
    MAMBA_NAMES,
    decay_tensors,
    mamba_state,
    mamba_tensors,
    time_step_limits,
)
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.experts import Experts, ExpertSizes, load_experts, load_router, mixture
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mamba2 import Mamba2, Mamba2Shape, load_mamba2, mamba2
from lmserve.model.layers.mlp import PlainMlp, load_plain_mlp, plain_mlp
from lmserve.model.ops import Ops
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import check_experts

A = TypeVar("A")
W = TypeVar("W")

MAMBA, ATTENTION, MLP, EXPERTS = "mamba", "attention", "mlp", "moe"
# By the letters of older configurations, and by names.
KINDS = {
    "M": MAMBA,
    "*": ATTENTION,
    "-": MLP,
    "E": EXPERTS,
    "linear_attention": MAMBA,
    "full_attention": ATTENTION,
    **{kind: kind for kind in (MAMBA, ATTENTION, MLP, EXPERTS)},
}
PLAIN = ("up_proj", "down_proj")
DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "num_key_value_heads": 8,
    "intermediate_size": 21504,
    "mlp_hidden_act": "relu2",
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}
GGUF_NAMES = {
    "attn_norm": "norm",
    "attn_q": "mixer.q_proj",
    "attn_k": "mixer.k_proj",
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
    "ffn_gate_inp": "mixer.gate",
    "exp_probs_b": "mixer.gate.e_score_correction",
    "ffn_up_exps": "mixer.experts.up_proj",
    "ffn_down_exps": "mixer.experts.down_proj",
    "ffn_up_shexp": "mixer.shared_experts.up_proj",
    "ffn_down_shexp": "mixer.shared_experts.down_proj",
    "ffn_latent_down": "mixer.fc1_latent_proj",
    "ffn_latent_up": "mixer.fc2_latent_proj",
    **{part: f"mixer.{name}" for part, name in MAMBA_NAMES.items()},
}


@dataclass(frozen=True, slots=True)
class NemotronExperts:
    """`count` experts of width `size` beside a network of width `shared_size`; `latent_size`: what they read and give.

    latent_size None: that is as wide as the model.
    """

    count: int
    size: int
    shared_size: int
    latent_size: int | None
    router: Router


@dataclass(frozen=True, slots=True, kw_only=True)
class NemotronHConfig(ModelConfig):
    """`kinds`: what each layer is, MAMBA, ATTENTION, MLP or EXPERTS; `experts`: of the last."""

    kinds: tuple[str, ...]
    mamba: Mamba2Shape
    experts: NemotronExperts | None

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        if (experts := self.experts) is not None:
            check_experts(experts.count, experts.size, experts.shared_size, experts.router)
            if not 1 <= (experts.latent_size or 1) <= LARGEST["hidden_size"]:
                raise CheckpointError(f"experts read {experts.latent_size} numbers of a token; it must be at least 1")


def _hf_config(raw: dict[str, Any]) -> NemotronHConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    given = raw.get("hybrid_override_pattern") or raw.get("layers_block_type") or raw.get("layer_types")
    if not isinstance(given, (str, list)) or not given:
        raise CheckpointError("config.json: hybrid_override_pattern or layers_block_type must say what the layers are")
    unknown = sorted({str(kind) for kind in given} - KINDS.keys())
    if unknown:
        raise CheckpointError(f"config.json: a layer of kind {unknown[0]!r} is not known")
    kinds = tuple(KINDS[kind] for kind in given)
    fields = hf_fields("nemotron_h", raw | {"num_hidden_layers": len(kinds)}, eps="layer_norm_epsilon")
    fields["activation"] = named_activation(raw["mlp_hidden_act"])
    shape = Mamba2Shape(
        groups=int(raw["n_groups"]),
        conv_bias=bool(raw["use_conv_bias"]),
        bias=bool(raw["use_bias"]),
        limits=time_step_limits(raw),
    )
    return _config(
        fields,
        kinds,
        shape,
        kernel=int(raw["conv_kernel"]),
        heads=int(raw["mamba_num_heads"]),
        rows=int(raw["ssm_state_size"]),
        inner=int(raw["mamba_num_heads"]) * int(raw["mamba_head_dim"]),
        mlp_bias=bool(raw["mlp_bias"]),
        experts=_hf_experts(raw) if EXPERTS in kinds else None,
    )


def _hf_experts(raw: dict[str, Any]) -> NemotronExperts:
    latent = raw.get("moe_latent_size")
    return NemotronExperts(
        count=experts_of(raw, "n_routed_experts", "num_local_experts"),
        size=int(raw["moe_intermediate_size"]),
        shared_size=int(raw["moe_shared_expert_intermediate_size"]),
        latent_size=None if latent is None else int(latent),
        router=Router(
            "corrected_sigmoid",
            int(raw["num_experts_per_tok"]),
            factor=float(raw["routed_scaling_factor"]),
            normalized=bool(raw["norm_topk_prob"]),
            groups=int(raw["n_group"]),
            top_groups=int(raw["topk_group"]),
        ),
    )


def _gguf_config(file: GgufModel) -> NemotronHConfig:
    rms = file.value("attention.layer_norm_rms_epsilon", 0.0) != 0
    fields = gguf_fields(
        "nemotron_h", file, eps="layer_norm_rms_epsilon" if rms else "layer_norm_epsilon", experts=True
    )
    layers = fields["num_layers"]
    kv_heads, inner = file.value("attention.head_count_kv"), file.value("feed_forward_length")
    if not isinstance(kv_heads, list) or not isinstance(inner, list) or not len(kv_heads) == len(inner) == layers:
        raise CheckpointError(
            f"{file.path}: attention.head_count_kv and feed_forward_length must have a number for each layer ({layers})"
        )
    # The last block guesses tokens ahead.
    fields["num_layers"] -= int(file.value("nextn_predict_layers", 0))
    kinds = []
    for index in range(fields["num_layers"]):
        network = EXPERTS if f"blk.{index}.ffn_gate_inp.weight" in file.tensors else MLP
        kinds.append(ATTENTION if kv_heads[index] else network if inner[index] else MAMBA)
    if MLP in kinds:
        fields["intermediate_size"] = int(inner[kinds.index(MLP)])
    fields["activation"] = RELU_SQUARED
    shape = Mamba2Shape(
        groups=int(file.value("ssm.group_count")),
        conv_bias=any(name.endswith(".ssm_conv1d.bias") for name in file.tensors),
        bias=any(name.endswith(".ssm_in.bias") for name in file.tensors),
    )
    return _config(
        fields,
        tuple(kinds),
        shape,
        kernel=int(file.value("ssm.conv_kernel")),
        heads=int(file.value("ssm.time_step_rank")),
        rows=int(file.value("ssm.state_size")),
        inner=int(file.value("ssm.inner_size")),
        mlp_bias=any(name.endswith(".ffn_up.bias") for name in file.tensors),
        experts=_gguf_experts(file) if EXPERTS in kinds else None,
    )


def _gguf_experts(file: GgufModel) -> NemotronExperts:
    size, top_k = file.value("expert_feed_forward_length"), file.value("expert_used_count")
    if isinstance(size, list) or isinstance(top_k, list):
        raise CheckpointError(f"{file.path}: models whose layers differ in their experts are not supported")
    return NemotronExperts(
        count=int(file.value("expert_count")),
        size=int(size),
        shared_size=int(file.value("expert_shared_feed_forward_length", size)),
        latent_size=int(file.value("moe_latent_size", 0)) or None,
        router=Router(
            "corrected_sigmoid",
            int(top_k),
            factor=float(file.value("expert_weights_scale", 1.0)) or 1.0,
            normalized=bool(file.value("expert_weights_norm", False)),
        ),
    )


def _config(
    fields: dict[str, Any],
    kinds: tuple[str, ...],
    shape: Mamba2Shape,
    *,
    mlp_bias: bool,
    experts: NemotronExperts | None,
    **state: int,
) -> NemotronHConfig:
    if MAMBA not in kinds or ATTENTION not in kinds:
        raise CheckpointError("a Nemotron-H must have Mamba-2 mixers and attention")
    places = tuple(index for index, kind in enumerate(kinds) if kind == ATTENTION)
    return NemotronHConfig(
        **fields,
        attention=attention_layers(fields, ropes=[None] * len(kinds))[: len(places)],
        attention_places=places,
        recurrent=(mamba_state(shape, **state),) * kinds.count(MAMBA),
        kinds=kinds,
        mamba=shape,
        mlp_bias=mlp_bias,
        experts=experts,
    )


def _hf_tensors(tensors: Tensors, config: NemotronHConfig) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        inner = name.replace("backbone.", "model.", 1) if name.startswith("backbone.") else name
        inner = inner.replace("model.embeddings.", "model.embed_tokens.").replace("model.norm_f.", "model.norm.")
        if not inner.startswith("mtp."):
            found[inner] = tensor
    return _tensors(decay_tensors(found), config)


def _tensors(tensors: Tensors, config: NemotronHConfig) -> Tensors:
    found = mamba_tensors(tensors, config, "mixer")
    return found if config.experts is None else stacked(found, config.experts.count)


def _gguf_tensors(tensors: Tensors, config: NemotronHConfig) -> Tensors:
    kept = without_further_tokens(tensors, config.num_layers)
    named = {name.replace(".e_score_correction.bias", ".e_score_correction_bias"): kept[name] for name in kept}
    return _tensors(named, config)


@dataclass(frozen=True, slots=True)
class NemotronHLayer(Generic[W]):
    """Loaded weights of one layer; `place` is its entry of the configuration's `attention` or `recurrent`."""

    place: int
    norm: W
    mixer: SelfAttention[W] | Mamba2[W] | PlainMlp[W] | Experts[W]


class NemotronH(Generic[A, W]):
    """What each layer gives is added to the residual states."""

    def __init__(self, config: NemotronHConfig, load: Loader[A, W]) -> None:
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)
        ]
        self.norm = load.rms_norm("model.norm", hidden, config.norm_eps)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops = self.ops
        states = ops.embed(self.embedding)
        normed = ops.norm(states, self.layers[0].norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            inner = self._inner(ops, normed, layer)
            if last and sampled_rows_only:
                inner, states = ops.rows(inner), ops.rows(states)
            following = self.norm if last else self.layers[index + 1].norm
            normed, states = ops.add_norm(self._outer(ops, inner, layer), states, following)
        return normed

    def _inner(self, ops: Ops[A, W], normed: A, layer: NemotronHLayer[W]) -> A:
        """What a layer makes of all tokens: its input where each token passes it by itself."""
        if isinstance(layer.mixer, Mamba2):
            return mamba2(ops, normed, layer.place, layer.mixer)
        if isinstance(layer.mixer, SelfAttention):
            return attend(ops, normed, layer.place, layer.mixer)
        return normed

    def _outer(self, ops: Ops[A, W], inner: A, layer: NemotronHLayer[W]) -> A:
        """What it then makes of each token."""
        if isinstance(layer.mixer, Experts):
            return mixture(ops, inner, layer.mixer)
        if isinstance(layer.mixer, PlainMlp):
            return plain_mlp(ops, inner, layer.mixer, self.config.activation)
        return ops.linear(inner, layer.mixer.output)


def _layer(config: NemotronHConfig, index: int, load: Loader[A, W]) -> NemotronHLayer[W]:
    hidden, eps, own, kind = config.hidden_size, config.norm_eps, load.within("mixer"), config.kinds[index]
    place = config.kinds[:index].count(kind)
    mixer: SelfAttention[W] | Mamba2[W] | PlainMlp[W] | Experts[W]
    if kind == MAMBA:
        mixer = load_mamba2(own, config.recurrent[place], config.mamba, hidden, eps)
    elif kind == ATTENTION:
        mixer = load_self_attention(own, config.attention[place], hidden)
    elif config.experts is not None and kind == EXPERTS:
        mixer = _experts(config, config.experts, own)
    else:
        mixer = load_plain_mlp(own, PLAIN, hidden, config.intermediate_size, bias=config.mlp_bias)
    return NemotronHLayer(place=place, norm=load.rms_norm("norm", hidden, eps), mixer=mixer)


def _experts(config: NemotronHConfig, experts: NemotronExperts, load: Loader[A, W]) -> Experts[W]:
    hidden, count, latent, bias = config.hidden_size, experts.count, experts.latent_size, config.mlp_bias
    correction = "gate.e_score_correction_bias"
    width = latent or hidden
    around = None
    if latent is not None:
        before = load.linear({"fc1_latent_proj": latent}, hidden, bias=bias)
        around = before, load.linear({"fc2_latent_proj": hidden}, latent, bias=bias)
    return Experts(
        router=load_router(load, "gate", experts.router, count, hidden, correction=correction),
        experts=load_experts(
            load.within("experts"), ExpertSizes(count, experts.size), width, config.activation, gate=False
        ),
        shared=load_plain_mlp(load.within("shared_experts"), PLAIN, hidden, experts.shared_size, bias=bias),
        activation=config.activation,
        latent=around,
    )


FAMILY = Family(
    name="nemotron_h",
    kind="generate",
    hf_architectures=("NemotronHForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=NemotronH,
    limits="the heads of Nemotron 3 that guess tokens ahead (MTP) are not used",
    gguf_architecture="nemotron_h",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_gguf_tensors,
)
# The GGUF files of Nemotron 3 have an architecture of their own.
WITH_EXPERTS = replace(FAMILY, name="nemotron_h_moe", hf_architectures=(), gguf_architecture="nemotron_h_moe")

FAMILIES = (FAMILY, WITH_EXPERTS)
