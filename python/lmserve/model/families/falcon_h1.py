"""Falcon-H1: attention and a Mamba-2 mixer side by side in each layer, and constants that multiply what they take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from lmserve.model.activation import SILU
from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import attention_layers, gguf_fields, hf_fields
from lmserve.model.families.recurrent_tensors import (
    MAMBA_NAMES,
    ScaledRows,
    decay_tensors,
    mamba_state,
    mamba_tensors,
    time_step_limits,
)
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mamba2 import Mamba2, Mamba2Shape, load_mamba2, mamba2

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_conv_bias": True,
    "mamba_rms_norm": False,
    "mamba_norm_before_gate": True,
}
# None of the published models has them, and the constants would multiply some of them.
REFUSED = ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias")
GGUF_NAMES = {
    "output_norm": "model.final_layernorm",
    "ffn_norm": "pre_ff_layernorm",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    **{part: f"mamba.{name}" for part, name in MAMBA_NAMES.items()},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FalconH1Config(ModelConfig):
    """The constants; those of queries, keys and logits are in `attention` and `logits_scale`."""

    mamba: Mamba2Shape
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0  # of what attention gives
    mamba_multiplier: float = 1.0
    mlp_multipliers: tuple[float, float] = (1.0, 1.0)  # of the gate and of the output
    input_multipliers: tuple[float, ...] = (1.0,) * 5  # of a mixer's z, x, b, c and dt


def _hf_config(raw: dict[str, Any]) -> FalconH1Config:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    for name in REFUSED:
        if raw.get(name):
            raise CheckpointError(f"config.json: {name} is not supported in a Falcon-H1")
    if raw["mamba_rms_norm"] and raw["mamba_norm_before_gate"]:
        raise CheckpointError("config.json: mamba_norm_before_gate is not supported")
    fields = hf_fields("falcon_h1", raw)
    shape = Mamba2Shape(
        groups=int(raw["mamba_n_groups"]),
        conv_bias=bool(raw["mamba_conv_bias"]),
        bias=False,
        limits=time_step_limits(raw),
        normed=bool(raw["mamba_rms_norm"]),
    )
    inner = raw.get("mamba_d_ssm") or int(raw.get("mamba_expand", 2)) * fields["hidden_size"]
    attended, mixed = _number(raw, "attention_in_multiplier"), _number(raw, "ssm_in_multiplier")
    scale = fields["head_dim"] ** -0.5 * attended**2 * _number(raw, "key_multiplier")
    gate, output = _numbers(raw, "mlp_multipliers", 2)
    return FalconH1Config(
        **fields | {"logits_scale": _number(raw, "lm_head_multiplier")},
        attention=attention_layers(fields, scale=scale),
        recurrent=(
            mamba_state(
                shape,
                kernel=int(raw["mamba_d_conv"]),
                heads=int(raw["mamba_n_heads"]),
                rows=int(raw["mamba_d_state"]),
                inner=int(inner),
            ),
        )
        * fields["num_layers"],
        mamba=shape,
        embedding_multiplier=_number(raw, "embedding_multiplier"),
        attention_multiplier=attended * _number(raw, "attention_out_multiplier"),
        mamba_multiplier=_number(raw, "ssm_out_multiplier"),
        mlp_multipliers=(gate, output),
        input_multipliers=tuple(mixed * part for part in _numbers(raw, "ssm_multipliers", 5)),
    )


def _number(raw: dict[str, Any], name: str) -> float:
    value = float(raw.get(name, 1.0))
    if not math.isfinite(value):
        raise CheckpointError(f"config.json: {name} must be finite, but is {value}")
    return value


def _numbers(raw: dict[str, Any], name: str, count: int) -> tuple[float, ...]:
    given = raw.get(name, [1.0] * count)
    if not isinstance(given, (list, tuple)) or len(given) != count:
        raise CheckpointError(f"config.json: {name} must be {count} numbers, but is {given!r}")
    return tuple(_number({name: value}, name) for value in given)


def _gguf_config(file: GgufModel) -> FalconH1Config:
    # The constants are in the tensors.
    fields = gguf_fields("falcon_h1", file)
    shape = Mamba2Shape(
        groups=int(file.value("ssm.group_count")),
        conv_bias=any(name.endswith(".ssm_conv1d.bias") for name in file.tensors),
        bias=False,
        normed=any(name.endswith(".ssm_norm.weight") for name in file.tensors),
    )
    state = mamba_state(
        shape,
        kernel=int(file.value("ssm.conv_kernel")),
        heads=int(file.value("ssm.time_step_rank")),
        rows=int(file.value("ssm.state_size")),
        inner=int(file.value("ssm.inner_size")),
    )
    layers = fields["num_layers"]
    return FalconH1Config(**fields, attention=attention_layers(fields), recurrent=(state,) * layers, mamba=shape)


def _hf_tensors(tensors: Tensors, config: FalconH1Config) -> Tensors:
    found = _tensors(decay_tensors(tensors), config)
    layer, groups = config.recurrent[0], config.mamba.groups
    widths = (layer.heads * layer.columns, groups * layer.rows, groups * layer.rows)
    factors = np.repeat(np.array(config.input_multipliers[1:4], np.float32), widths)
    # A convolution has a weight for each channel, so its constant can be in it.
    return {
        name: ScaledRows(tensor, factors)
        if name.endswith(".conv1d.weight") and tensor.shape[0] == len(factors)
        else tensor
        for name, tensor in found.items()
    }


def _gguf_tensors(tensors: Tensors, config: FalconH1Config) -> Tensors:
    # Files have this norm without the end that all other tensors have.
    named = {
        f"model.layers.{name.split('.')[1]}.pre_ff_layernorm.weight" if name.endswith(".ffn_norm") else name: tensor
        for name, tensor in tensors.items()
    }
    return _tensors(named, config)


def _tensors(tensors: Tensors, config: FalconH1Config) -> Tensors:
    return mamba_tensors(tensors, config, "mamba")


@dataclass(frozen=True, slots=True)
class FalconH1Layer(Generic[W]):
    """Loaded weights of one layer."""

    input_norm: W
    attention: SelfAttention[W]
    mamba: Mamba2[W]
    mlp_norm: W
    gate: W
    up: W
    down: W


class FalconH1(Generic[A, W]):
    """Attention and a mixer of the same input, then a feed-forward network, all added to the residual states."""

    def __init__(self, config: FalconH1Config, load: Loader[A, W]) -> None:
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)
        ]
        self.norm = load.rms_norm("model.final_layernorm", hidden, config.norm_eps)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops, config = self.ops, self.config
        gate_scale, *_, step_scale = config.input_multipliers
        states = ops.embed(self.embedding, config.embedding_multiplier)
        normed = ops.norm(states, self.layers[0].input_norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            mixed = mamba2(ops, normed, index, layer.mamba, gate_scale=gate_scale, step_scale=step_scale)
            attended = attend(ops, normed, index, layer.attention)
            if last and sampled_rows_only:
                mixed, attended, states = ops.rows(mixed), ops.rows(attended), ops.rows(states)
            states = ops.add(ops.linear(mixed, layer.mamba.output), states, scale=config.mamba_multiplier)
            normed, states = ops.add_norm(
                ops.linear(attended, layer.attention.output), states, layer.mlp_norm, scale=config.attention_multiplier
            )
            gate = ops.scale(ops.linear(normed, layer.gate), config.mlp_multipliers[0])
            inner = ops.linear(ops.activate(gate, SILU, ops.linear(normed, layer.up)), layer.down)
            following = self.norm if last else self.layers[index + 1].input_norm
            normed, states = ops.add_norm(inner, states, following, scale=config.mlp_multipliers[1])
        return normed


def _layer(config: FalconH1Config, index: int, load: Loader[A, W]) -> FalconH1Layer[W]:
    hidden, eps, mlp = config.hidden_size, config.norm_eps, load.within("feed_forward")
    return FalconH1Layer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=load_self_attention(load.within("self_attn"), config.attention[index], hidden),
        mamba=load_mamba2(load.within("mamba"), config.recurrent[index], config.mamba, hidden, eps),
        mlp_norm=load.rms_norm("pre_ff_layernorm", hidden, eps),
        gate=mlp.linear({"gate_proj": config.intermediate_size}, hidden),
        up=mlp.linear({"up_proj": config.intermediate_size}, hidden),
        down=mlp.linear({"down_proj": hidden}, config.intermediate_size),
    )


FAMILY = Family(
    name="falcon_h1",
    kind="generate",
    hf_architectures=("FalconH1ForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=FalconH1,
    limits="no biases, and no norm of a mixer before its gate",
    gguf_architecture="falcon-h1",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_folds_factors=True,
    gguf_tensors=_gguf_tensors,
)
