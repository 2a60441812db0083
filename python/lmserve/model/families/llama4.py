"""Llama 4 (Scout, Maverick; text): layers that rotate, with normed q and k, and every fourth that does not and scales
its queries by their position; experts of which each token passes one, weighted before it, beside a network for all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from lmserve.model.families.expert_tensors import GGUF_NAMES, renamed, stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import attention_layers, gguf_fields, hf_fields
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, load_self_attention
from lmserve.model.layers.experts import Experts, ExpertSizes, load_experts, load_router
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, load_gated_mlp
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import SparseConfig

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attention_chunk_size": 8192,
}
PERIOD = 4
# GGUF has no key for it: Maverick, which has so many experts, norms neither q nor k.
EXPERTS_WITHOUT_QK_NORM = 128
NAMES = {
    ".feed_forward.shared_expert.": ".mlp.shared_experts.",
    ".feed_forward.router.": ".mlp.gate.",
    ".feed_forward.": ".mlp.",
}


def _hf_config(raw: dict[str, Any]) -> SparseConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    expert_size = int(raw["intermediate_size"])
    fields = hf_fields(
        "llama4", raw | {"intermediate_size": raw["intermediate_size_mlp"]}, default_theta=5e5, interleaved=True
    )
    layers, step = fields["num_layers"], int(raw["interleave_moe_layer_step"])
    rotated = raw.get("no_rope_layers") or [
        (index + 1) % int(raw["no_rope_layer_interval"]) != 0 for index in range(layers)
    ]
    sparse = raw.get("moe_layers", list(range(step - 1, layers, step)))
    temperature = (float(raw["attn_scale"]), int(raw["floor_scale"])) if raw["attn_temperature_tuning"] else None
    return _config(
        fields,
        rotated=[bool(rotates) for rotates in rotated],
        temperature=temperature,
        chunk=int(raw["attention_chunk_size"]),
        qk_norm=bool(raw["use_qk_norm"]),
        bias=bool(raw.get("attention_bias", False)),
        num_experts=experts_of(raw, "num_local_experts"),
        expert_size=expert_size,
        router=Router("sigmoid", int(raw["num_experts_per_tok"])),
        sparse=tuple(index in sparse for index in range(layers)),
    )


def _gguf_config(file: GgufModel) -> SparseConfig:
    fields = gguf_fields("llama4", file, experts=True)
    layers, experts = fields["num_layers"], int(file.value("expert_count"))
    return _config(
        fields,
        rotated=[(index + 1) % PERIOD != 0 for index in range(layers)],
        temperature=(DEFAULTS["attn_scale"], int(file.value("attention.temperature_length", DEFAULTS["floor_scale"]))),
        chunk=int(file.value("attention.chunk_size", DEFAULTS["attention_chunk_size"])),
        qk_norm=experts != EXPERTS_WITHOUT_QK_NORM,
        bias=False,
        num_experts=experts,
        expert_size=int(file.value("expert_feed_forward_length")),
        router=Router("sigmoid", int(file.value("expert_used_count"))),
        sparse=tuple(f"blk.{index}.ffn_gate_inp.weight" in file.tensors for index in range(layers)),
    )


def _config(
    fields: dict[str, Any],
    *,
    rotated: list[bool],
    temperature: tuple[float, int] | None,
    chunk: int,
    qk_norm: bool,
    bias: bool,
    **experts: Any,
) -> SparseConfig:
    rope = fields["rope"]
    layers = attention_layers(fields, ropes=[rope if rotates else None for rotates in rotated])
    # Layers that rotate see tokens of the same chunk alone; within the first one that is what all see.
    context = min(fields["context_length"], chunk) if any(rotated) else fields["context_length"]
    return SparseConfig(
        **fields | {"context_length": context},
        # The first token of those that do not rotate has position 1.
        attention=tuple(
            layer if layer.rope is not None else replace(layer, temperature=temperature, temperature_offset=1)
            for layer in layers
        ),
        attention_bias=bias,
        output_bias=bias,
        qk_norm=qk_norm,
        shared_size=experts["expert_size"],
        **experts,
    )


def _hf_tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    return stacked(renamed(tensors, NAMES), config.num_experts, transposed=True)


def _gguf_tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    return stacked(tensors, config.num_experts)


class Llama4(PreNormDecoder[A, W]):
    """Attention, then one expert and the network beside it, or one network alone."""

    def __init__(self, config: SparseConfig, load: Loader[A, W]) -> None:
        super().__init__(config, load, _layer)


def _layer(config: SparseConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps, shape = config.hidden_size, config.norm_eps, config.attention[index]
    attention: SelfAttention[W] = load_self_attention(
        load.within("self_attn"), shape, hidden, bias=config.attention_bias, output_bias=config.output_bias
    )
    if config.qk_norm and shape.rope is not None:
        # The reference norms what is rotated; a rotation changes nothing of it.
        norm = load.unweighted_rms_norm(shape.head_dim, eps)
        attention = replace(attention, q_norm=norm, k_norm=norm)
    return PreNormLayer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=attention,
        mlp_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=_feed_forward(config, index, load.within("mlp")),
    )


def _feed_forward(config: SparseConfig, index: int, load: Loader[A, W]) -> GatedMlp[W] | Experts[W]:
    hidden = config.hidden_size
    if not config.sparse[index]:
        return load_gated_mlp(load, hidden, config.intermediate_size)
    sizes = ExpertSizes(config.num_experts, config.expert_size)
    return Experts(
        router=load_router(load, "gate", config.router, config.num_experts, hidden),
        experts=load_experts(load.within("experts"), sizes, hidden, config.activation, scaled_inputs=True),
        shared=load_gated_mlp(load.within("shared_experts"), hidden, config.expert_size),
        activation=config.activation,
    )


FAMILY = Family(
    name="llama4",
    kind="generate",
    hf_architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=Llama4,
    limits="contexts beyond one chunk of attention, 8,192 tokens; images",
    gguf_architecture="llama4",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_gguf_tensors,
    gguf_interleaved_rope=True,
    hf_interleaved_rope=True,
)
