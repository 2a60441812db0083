"""gpt-oss (20b, 120b): attention with sinks, every other layer with a window; experts with biases, whose gates and ups
are clamped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from lmserve.model.activation import Activation
from lmserve.model.families.expert_tensors import GGUF_NAMES, stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import (
    FULL,
    SLIDING,
    attention_layers,
    gguf_fields,
    gguf_windows,
    hf_fields,
    hf_windows,
)
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.experts import Experts, ExpertSizes, load_experts, load_router
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer
from lmserve.model.mxfp4_tensors import with_mxfp4_experts
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import SparseConfig

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {
    "head_dim": 64,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-5,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "rope_theta": 150000.0,
}
PERIOD = 2


def _hf_config(raw: dict[str, Any]) -> SparseConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    fields = hf_fields("gpt_oss", raw)
    layers = fields["num_layers"]
    raw.setdefault("layer_types", [FULL if (index + 1) % PERIOD == 0 else SLIDING for index in range(layers)])
    return _config(
        fields,
        hf_windows(raw),
        bias=bool(raw["attention_bias"]),
        experts=experts_of(raw, "num_local_experts", "num_experts"),
        top_k=int(raw["num_experts_per_tok"]),
        expert_size=fields["intermediate_size"],
        activation=Activation("clamped_swiglu", (float(raw["swiglu_alpha"]), float(raw["swiglu_limit"]))),
    )


def _gguf_config(file: GgufModel) -> SparseConfig:
    fields = gguf_fields("gpt_oss", file, experts=True)
    return _config(
        # The file has no key for it: the model's own rotation is not rounded to whole dimensions.
        fields | {"rope": replace(fields["rope"], truncate=False)},
        gguf_windows(file, period=PERIOD),
        bias="blk.0.attn_q.bias" in file.tensors,
        experts=int(file.value("expert_count")),
        top_k=int(file.value("expert_used_count")),
        expert_size=int(file.value("expert_feed_forward_length", fields["intermediate_size"])),
        activation=Activation("clamped_swiglu", (DEFAULTS["swiglu_alpha"], DEFAULTS["swiglu_limit"])),
    )


def _config(
    fields: dict[str, Any],
    windows: list[int | None],
    *,
    bias: bool,
    experts: int,
    top_k: int,
    expert_size: int,
    activation: Activation,
) -> SparseConfig:
    attention = attention_layers(fields, windows=windows)
    return SparseConfig(
        **fields | {"activation": activation},
        attention=tuple(replace(layer, sinks=True) for layer in attention),
        attention_bias=bias,
        output_bias=bias,
        num_experts=experts,
        expert_size=expert_size,
        router=Router("softmax_of_chosen", top_k),
        sparse=(True,) * fields["num_layers"],
    )


def _hf_tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    return stacked(with_mxfp4_experts(tensors), config.num_experts, transposed=True, interleaved=True)


def _gguf_tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    named = {
        name.removesuffix(".weight") if name.endswith(".sinks.weight") else name: tensor
        for name, tensor in tensors.items()
    }
    return stacked(named, config.num_experts)


class GptOss(PreNormDecoder[A, W]):
    """Attention with sinks, then experts."""

    def __init__(self, config: SparseConfig, load: Loader[A, W]) -> None:
        super().__init__(config, load, _layer)


def _layer(config: SparseConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    sizes = ExpertSizes(config.num_experts, config.expert_size)
    mlp = load.within("mlp")
    return PreNormLayer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
            sinks=True,
        ),
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=Experts(
            router=load_router(mlp, "router", config.router, config.num_experts, hidden, bias=True),
            experts=load_experts(mlp.within("experts"), sizes, hidden, config.activation, bias=True),
        ),
    )


FAMILY = Family(
    name="gpt_oss",
    kind="generate",
    hf_architectures=("GptOssForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=GptOss,
    gguf_architecture="gpt-oss",
    gguf_config=_gguf_config,
    gguf_names={
        **GGUF_NAMES,
        "ffn_gate_inp": "mlp.router",
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
    },
    gguf_tensors=_gguf_tensors,
)
