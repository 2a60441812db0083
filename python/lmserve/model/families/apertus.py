"""Apertus: norms of each head's q and k, and a feed-forward network without a gate, whose activation is learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from lmserve.model.activation import Activation
from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import gguf_fields, hf_fields
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import load_plain_mlp
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer
from lmserve.model.tensors import constant

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-5}
DEFAULT_THETA = 12e6
PARTS = ("alpha_p", "alpha_n", "beta")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApertusConfig(ModelConfig):
    """With the parameters that GGUF files have among their metadata: alpha_p, alpha_n and beta of each layer."""

    stored: tuple[tuple[float, ...], ...] = ()


def _hf_config(raw: dict[str, Any]) -> ApertusConfig:
    raw = DEFAULTS | raw
    if raw.get("hidden_act", "xielu") != "xielu":
        raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported (xielu is)")
    bias = bool(raw.get("attention_bias", False))
    fields = hf_fields("apertus", raw | {"hidden_act": "silu"}, default_theta=DEFAULT_THETA)
    return ApertusConfig(**fields, attention_bias=bias, output_bias=bias)


def _gguf_config(file: GgufModel) -> ApertusConfig:
    fields = gguf_fields("apertus", file)
    # Beside the architecture's own keys.
    lists = [file.lookup(f"xielu.{part}") for part in PARTS]
    stored = []
    for part, values in zip(PARTS, lists, strict=True):
        if not isinstance(values, list) or len(values) != fields["num_layers"]:
            raise CheckpointError(f"{file.path}: the key xielu.{part} must have a number for each layer")
        stored.append(tuple(float(value) for value in values))
    return ApertusConfig(**fields, stored=tuple(stored))


def _hf_tensors(tensors: Tensors, _config: ModelConfig) -> Tensors:
    # eps bounds rounding near 0, which single precision does not need; beta is stored without dimensions.
    return {
        name: constant(name, tensor.dequantize().reshape(-1).tolist()) if ".act_fn." in name else tensor
        for name, tensor in tensors.items()
        if not name.endswith(".act_fn.eps")
    }


def _gguf_tensors(tensors: Tensors, config: ApertusConfig) -> Tensors:
    own: Tensors = {
        f"model.layers.{index}.mlp.act_fn.{part}": constant(f"xielu.{part}", [value])
        for part, values in zip(PARTS, config.stored, strict=True)
        for index, value in enumerate(values)
    }
    return tensors | own


class Apertus(PreNormDecoder[A, W]):
    """Attention and a feed-forward network without a gate."""

    def __init__(self, config: ApertusConfig, load: Loader[A, W]) -> None:
        super().__init__(config, load, _layer)


def _layer(config: ApertusConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    learned = load.within("mlp.act_fn")
    positive, negative, beta = (learned.number(part) for part in PARTS)
    return PreNormLayer(
        input_norm=load.rms_norm("attention_layernorm", hidden, eps),
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
            qk_norm_eps=eps,
        ),
        mlp_norm=load.rms_norm("feedforward_layernorm", hidden, eps),
        mlp=load_plain_mlp(load.within("mlp"), ("up_proj", "down_proj"), hidden, config.intermediate_size, bias=False),
        activation=Activation("xielu", (_softplus(positive), beta + _softplus(negative), beta)),
    )


def _softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


FAMILY = Family(
    name="apertus",
    kind="generate",
    hf_architectures=("ApertusForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=Apertus,
    gguf_architecture="apertus",
    gguf_config=_gguf_config,
    gguf_names={"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"},
    gguf_tensors=_gguf_tensors,
)
