"""Nemotron-H and Nemotron Nano 2: layers that are a Mamba-2 mixer, attention without rotation or a feed-forward network
without a gate, each behind a norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.activation import RELU_SQUARED, named_activation
from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import attention_layers, gguf_fields, hf_fields
from lmserve.model.families.recurrent_tensors import (
    MAMBA_NAMES,
    decay_tensors,
    mamba_state,
    mamba_tensors,
    time_step_limits,
)
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mamba2 import Mamba2, Mamba2Shape, load_mamba2, mamba2
from lmserve.model.layers.mlp import PlainMlp, load_plain_mlp
from lmserve.model.ops import Ops

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
DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "num_key_value_heads": 8,
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
}
GGUF_NAMES = {
    "attn_norm": "norm",
    "attn_q": "mixer.q_proj",
    "attn_k": "mixer.k_proj",
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
    **{part: f"mixer.{name}" for part, name in MAMBA_NAMES.items()},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NemotronHConfig(ModelConfig):
    """`kinds`: what each layer is, MAMBA, ATTENTION or MLP."""

    kinds: tuple[str, ...]
    mamba: Mamba2Shape


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
    )


def _gguf_config(file: GgufModel) -> NemotronHConfig:
    rms = file.value("attention.layer_norm_rms_epsilon", 0.0) != 0
    fields = gguf_fields("nemotron_h", file, eps="layer_norm_rms_epsilon" if rms else "layer_norm_epsilon")
    layers = fields["num_layers"]
    kv_heads, inner = file.value("attention.head_count_kv"), file.value("feed_forward_length")
    if not isinstance(kv_heads, list) or not isinstance(inner, list) or not len(kv_heads) == len(inner) == layers:
        raise CheckpointError(
            f"{file.path}: attention.head_count_kv and feed_forward_length must have a number for each layer ({layers})"
        )
    kinds = [ATTENTION if heads else MLP if width else MAMBA for heads, width in zip(kv_heads, inner, strict=True)]
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
    )


def _config(
    fields: dict[str, Any], kinds: tuple[str, ...], shape: Mamba2Shape, *, mlp_bias: bool, **state: int
) -> NemotronHConfig:
    if EXPERTS in kinds:
        raise CheckpointError("the experts of Nemotron 3, which have no gate, are not supported")
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
    return mamba_tensors(tensors, config, "mixer")


@dataclass(frozen=True, slots=True)
class NemotronHLayer(Generic[W]):
    """Loaded weights of one layer; `place` is its entry of the configuration's `attention` or `recurrent`."""

    place: int
    norm: W
    mixer: SelfAttention[W] | Mamba2[W] | PlainMlp[W]


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
            inner, output = self._mix(ops, normed, layer)
            if last and sampled_rows_only:
                inner, states = ops.rows(inner), ops.rows(states)
            following = self.norm if last else self.layers[index + 1].norm
            normed, states = ops.add_norm(ops.linear(inner, output), states, following)
        return normed

    def _mix(self, ops: Ops[A, W], normed: A, layer: NemotronHLayer[W]) -> tuple[A, W]:
        """What a layer makes of its input before its last linear layer, and that layer."""
        if isinstance(layer.mixer, Mamba2):
            return mamba2(ops, normed, layer.place, layer.mixer), layer.mixer.output
        if isinstance(layer.mixer, SelfAttention):
            return attend(ops, normed, layer.place, layer.mixer), layer.mixer.output
        return ops.activate(ops.linear(normed, layer.mixer.up), self.config.activation), layer.mixer.down


def _layer(config: NemotronHConfig, index: int, load: Loader[A, W]) -> NemotronHLayer[W]:
    hidden, eps, own, kind = config.hidden_size, config.norm_eps, load.within("mixer"), config.kinds[index]
    place = config.kinds[:index].count(kind)
    mixer: SelfAttention[W] | Mamba2[W] | PlainMlp[W]
    if kind == MAMBA:
        mixer = load_mamba2(own, config.recurrent[place], config.mamba, hidden, eps)
    elif kind == ATTENTION:
        mixer = load_self_attention(own, config.attention[place], hidden)
    else:
        mixer = load_plain_mlp(own, ("up_proj", "down_proj"), hidden, config.intermediate_size, bias=config.mlp_bias)
    return NemotronHLayer(place=place, norm=load.rms_norm("norm", hidden, eps), mixer=mixer)


FAMILY = Family(
    name="nemotron_h",
    kind="generate",
    hf_architectures=("NemotronHForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=NemotronH,
    limits="models without experts only",
    gguf_architecture="nemotron_h",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_tensors,
)
