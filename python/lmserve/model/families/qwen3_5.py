"""Qwen3.5 and 3.6, dense (0.8B to 27B): three gated delta nets to one layer of attention, whose output is gated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from lmserve.model.activation import SIGMOID
from lmserve.model.config import ModelConfig, RecurrentLayer
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import FULL, gguf_fields, hf_fields, hybrid_layers
from lmserve.model.families.recurrent_tensors import conv_tensor, decay_tensors
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.delta_net import DeltaNet, delta_net, load_delta_net
from lmserve.model.layers.experts import Experts
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, load_gated_mlp
from lmserve.model.layers.mtp import MtpWeights, load_mtp, mtp_input
from lmserve.model.layers.pre_norm import feed_forward
from lmserve.model.ops import DraftOps, Ops
from lmserve.model.tensors import ShiftedTensor

A = TypeVar("A")
W = TypeVar("W")

LINEAR = "linear_attention"
DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
GGUF_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt": "linear_attn.dt",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}


HEAD_NAMES = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head_norm",
}


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**hf_hybrid("qwen3_5", raw))


def hf_hybrid(family: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` of Qwen's hybrids."""
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    fields = hf_fields(family, raw)
    interval, layers = int(raw["full_attention_interval"]), fields["num_layers"]
    types = raw.get("layer_types") or [FULL if (index + 1) % interval == 0 else LINEAR for index in range(layers)]
    unknown = sorted(set(types) - {FULL, LINEAR})
    if unknown or len(types) != layers:
        given = f"{unknown[0]!r} is among them" if unknown else f"there are {len(types)}"
        raise CheckpointError(f"config.json: each of {layers} layer_types must be {FULL} or {LINEAR}, but {given}")
    state = _state(
        kernel=int(raw["linear_conv_kernel_dim"]),
        keys=int(raw["linear_num_key_heads"]),
        heads=int(raw["linear_num_value_heads"]),
        rows=int(raw["linear_key_head_dim"]),
        columns=int(raw["linear_value_head_dim"]),
    )
    bias = bool(raw.get("attention_bias", False))
    return (
        fields
        | hybrid_layers(fields, [kind == LINEAR for kind in types], state)
        | {
            "attention_bias": bias,
            "output_bias": bias,
        }
    )


def _state(*, kernel: int, keys: int, heads: int, rows: int, columns: int, tiled: bool = False) -> RecurrentLayer:
    if keys < 1 or heads % keys:
        raise CheckpointError(f"the {heads} value heads of the delta nets are no multiple of their {keys} key heads")
    channels = 2 * keys * rows + heads * columns
    return RecurrentLayer(channels, kernel, heads, rows, columns, tiled)


def _gguf_config(file: GgufModel) -> ModelConfig:
    return ModelConfig(**gguf_hybrid("qwen3_5", file, tiled=True))


def gguf_hybrid(family: str, file: GgufModel, *, tiled: bool, experts: bool = False) -> dict[str, Any]:
    """Fields of `ModelConfig` of Qwen's hybrids; `tiled`: see `RecurrentLayer`."""
    fields = gguf_fields(family, file, experts=experts)
    layers = fields["num_layers"] - int(file.value("nextn_predict_layers", 0))
    recurrent = file.value("attention.recurrent_layers", 0)
    if not isinstance(recurrent, list):
        interval = int(file.value("full_attention_interval", 4))
        recurrent = [(index + 1) % interval != 0 for index in range(layers)]
    fields["num_layers"] = layers
    heads = int(file.value("ssm.time_step_rank"))
    state = _state(
        kernel=int(file.value("ssm.conv_kernel")),
        keys=int(file.value("ssm.group_count")),
        heads=heads,
        rows=int(file.value("ssm.state_size")),
        columns=int(file.value("ssm.inner_size")) // max(heads, 1),
        tiled=tiled,
    )
    biases = {part: any(name.endswith(f".{part}.bias") for name in file.tensors) for part in ("attn_q", "attn_output")}
    return (
        fields
        | hybrid_layers(fields, [bool(kind) for kind in recurrent[:layers]], state)
        | {"attention_bias": biases["attn_q"], "output_bias": biases["attn_output"]}
    )


def _hf_tensors(tensors: Tensors, config: ModelConfig) -> Tensors:
    return gated_queries(shifted_norms(decay_tensors(head_tensors(tensors, config))), config)


def head_tensors(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The tensors, those of the head that guesses tokens ahead under the names that GGUF has; or without them."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        own = name.removeprefix("model.")
        if not own.startswith("mtp."):
            found[name] = tensor
        elif config.mtp:
            stem, _, kind = own.removeprefix("mtp.").rpartition(".")
            stem = f"nextn.{HEAD_NAMES[stem]}" if stem in HEAD_NAMES else stem.removeprefix("layers.0.")
            found[f"{config.mtp_layer}.{stem}.{kind}"] = tensor
    return found


def shifted_norms(tensors: Tensors) -> Tensors:
    """Weights of norms as they are multiplied by: 1 + what is stored, but of the norms within delta nets."""
    return {
        name: ShiftedTensor(tensor, 1.0)
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")
        else tensor
        for name, tensor in tensors.items()
    }


def gated_queries(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The tensors with q_proj, whose heads are stored with their gates, as q_proj and gate_proj."""
    found = dict(tensors)
    for index, layer in zip(config.attention_places, config.attention, strict=True):
        heads = np.arange(layer.num_heads)[:, None] * 2 * layer.head_dim + np.arange(layer.head_dim)
        for kind in ("weight", "bias"):
            prefix = f"model.layers.{index}.self_attn"
            both = tensors.get(f"{prefix}.q_proj.{kind}")
            if both is None:
                continue
            if both.shape[0] != 2 * layer.q_size:
                raise CheckpointError(f"tensor {both.name} must have {2 * layer.q_size} rows, but has {both.shape[0]}")
            found[f"{prefix}.q_proj.{kind}"] = both.select_rows(heads.reshape(-1))
            found[f"{prefix}.gate_proj.{kind}"] = both.select_rows((heads + layer.head_dim).reshape(-1))
    return found


def _gguf_tensors(tensors: Tensors, config: ModelConfig) -> Tensors:
    return gated_queries(gguf_recurrent(tensors, config), config)


def gguf_recurrent(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The tensors under the names that delta nets load, without those of layers that are not used."""
    found: Tensors = {}
    layers = config.num_layers + config.mtp
    for name, tensor in tensors.items():
        parts = name.split(".")
        if name.startswith(("model.layers.", "blk.")):
            at = 1 if parts[0] == "blk" else 2
            if int(parts[at]) >= layers:
                continue
        if parts[0] == "blk" and parts[2] == "nextn":
            found[f"model.layers.{'.'.join(parts[1:])}"] = tensor
        elif parts[0] == "blk" and parts[2:] == ["ssm_a"]:
            found[f"model.layers.{parts[1]}.linear_attn.A"] = tensor
        elif name.endswith("linear_attn.dt.bias"):
            found[name.replace("dt.bias", "dt_bias")] = tensor
        elif name.endswith("linear_attn.conv1d.weight"):
            found[name] = conv_tensor(tensor)
        else:
            found[name] = tensor
    return found


@dataclass(frozen=True, slots=True)
class GatedAttention(Generic[W]):
    """Loaded weights of attention, and of the gate of its output."""

    attention: SelfAttention[W]
    gate: W


@dataclass(frozen=True, slots=True)
class HybridLayer(Generic[W]):
    """Loaded weights of one layer; `place` is its entry of the configuration's `attention` or `recurrent`."""

    place: int
    input_norm: W
    mixer: GatedAttention[W] | DeltaNet[W]
    output: W
    mlp_norm: W
    mlp: GatedMlp[W] | Experts[W]


LoadMlp = Callable[[int, Loader[A, W]], GatedMlp[W] | Experts[W]]


class QwenHybrid(Generic[A, W]):
    """Pre-norm attention or delta net, then a feed-forward network or experts, each added to the residual states."""

    def __init__(self, config: ModelConfig, load: Loader[A, W], load_mlp: LoadMlp[A, W] | None = None) -> None:
        """`load_mlp` is given a layer's number and the loader of its `mlp`; None: all have a feed-forward network."""
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        load_mlp = load_mlp or (lambda _, own: load_gated_mlp(own, hidden, config.intermediate_size))
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}"), load_mlp) for index in range(config.num_layers)
        ]
        self.norm = load.rms_norm("model.norm", hidden, config.norm_eps)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)
        self.mtp: tuple[MtpWeights[W], HybridLayer[W]] | None = None
        if config.mtp:
            own = load.within(config.mtp_layer)
            weights = load_mtp(own.within("nextn"), hidden, config.norm_eps)
            self.mtp = weights, _layer(config, config.num_layers, own, load_mlp)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops = self.ops
        states = ops.embed(self.embedding)
        normed = ops.norm(states, self.layers[0].input_norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            mixed = mix(ops, normed, layer)
            if last and sampled_rows_only:
                mixed, states = ops.rows(mixed), ops.rows(states)
            normed, states = ops.add_norm(ops.linear(mixed, layer.output), states, layer.mlp_norm)
            following = self.norm if last else self.layers[index + 1].input_norm
            inner = feed_forward(ops, normed, layer.mlp, self.config.activation)
            normed, states = ops.add_norm(inner, states, following)
        return normed

    def draft(self, ops: DraftOps[A, W], states: A) -> None:
        """See `Drafting`. The head is made for states after the last norm."""
        if self.mtp is None:
            raise TypeError("no head that guesses tokens ahead is loaded")
        weights, layer = self.mtp
        states = mtp_input(ops, states, self.embedding, weights)
        mixed = mix(ops, ops.norm(states, layer.input_norm), layer)
        mixed, states = ops.rows(mixed), ops.rows(states)
        normed, states = ops.add_norm(ops.linear(mixed, layer.output), states, layer.mlp_norm)
        inner = feed_forward(ops, normed, layer.mlp, self.config.activation)
        ops.draft(ops.add_norm(inner, states, weights.norm)[0], self.head)


def mix(ops: Ops[A, W], normed: A, layer: HybridLayer[W]) -> A:
    """What a layer's attention or delta net gives, before the output's linear layer."""
    if isinstance(layer.mixer, DeltaNet):
        return delta_net(ops, normed, layer.place, layer.mixer)
    attended = attend(ops, normed, layer.place, layer.mixer.attention)
    return ops.activate(ops.linear(normed, layer.mixer.gate), SIGMOID, attended)


def _layer(config: ModelConfig, index: int, load: Loader[A, W], load_mlp: LoadMlp[A, W]) -> HybridLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    mixer: GatedAttention[W] | DeltaNet[W]
    if index in config.attention_places:
        place = config.attention_places.index(index)
        mixer = _attention(config, place, load.within("self_attn"))
        output = mixer.attention.output
    else:
        place = index - sum(other < index for other in config.attention_places)
        mixer = load_delta_net(load.within("linear_attn"), config.recurrent[place], hidden, eps)
        output = mixer.output
    return HybridLayer(
        place=place,
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        mixer=mixer,
        output=output,
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=load_mlp(index, load.within("mlp")),
    )


def _attention(config: ModelConfig, place: int, load: Loader[A, W]) -> GatedAttention[W]:
    layer, bias = config.attention[place], config.attention_bias
    attention = load_self_attention(
        load, layer, config.hidden_size, bias=bias, output_bias=config.output_bias, qk_norm_eps=config.norm_eps
    )
    return GatedAttention(attention, load.linear({"gate_proj": layer.q_size}, config.hidden_size, bias=bias))


FAMILY = Family(
    name="qwen3_5",
    kind="generate",
    hf_architectures=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=QwenHybrid,
    gguf_architecture="qwen35",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_gguf_tensors,
    mtp=ModelConfig.with_mtp,
)
