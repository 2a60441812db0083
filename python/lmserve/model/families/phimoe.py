"""Phi-3.5-MoE: layer norms, biases and longrope, and experts in every layer, chosen by a sparse mixer."""

from __future__ import annotations

from typing import Any, TypeVar

from lmserve.model.errors import CheckpointError
from lmserve.model.families.expert_tensors import GGUF_NAMES, renamed, stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import attention_layers, gguf_fields, gguf_windows, hf_fields, hf_windows
from lmserve.model.families.qwen3_moe import load_feed_forward
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.pre_norm import PreNormDecoder, PreNormLayer
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import SparseConfig

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 2,
    "num_local_experts": 16,
    "router_jitter_noise": 0.01,
    "attention_bias": False,
}
JITTER = 0.01


def _hf_config(raw: dict[str, Any]) -> SparseConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    fields = hf_fields("phimoe", _with_attention_factor(raw), default_theta=1e6)
    bias = bool(raw["attention_bias"])
    return SparseConfig(
        **fields,
        attention=attention_layers(fields, windows=hf_windows(raw)),
        attention_bias=bias,
        output_bias=bias,
        num_experts=experts_of(raw, "num_local_experts"),
        expert_size=fields["intermediate_size"],
        router=Router("sparse_mixer", int(raw["num_experts_per_tok"]), jitter=float(raw["router_jitter_noise"])),
        sparse=(True,) * fields["num_layers"],
    )


def _with_attention_factor(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with the factor of cos and sin under the name that longrope has for it."""
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    scaling = dict(raw.get(key) or {})
    short, long = scaling.pop("short_mscale", None), scaling.pop("long_mscale", None)
    if short != long:
        raise CheckpointError(f"config.json: short_mscale {short} and long_mscale {long} of {key} must be the same")
    return raw | {key: scaling | ({} if long is None else {"attention_factor": long})}


def _gguf_config(file: GgufModel) -> SparseConfig:
    fields = gguf_fields("phimoe", file, experts=True)
    return SparseConfig(
        **fields,
        attention=attention_layers(fields, windows=gguf_windows(file, period=0)),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        num_experts=int(file.value("expert_count")),
        expert_size=int(file.value("expert_feed_forward_length", fields["intermediate_size"])),
        # The file has no key for it.
        router=Router("sparse_mixer", int(file.value("expert_used_count")), jitter=JITTER),
        sparse=(True,) * fields["num_layers"],
    )


def _tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    return stacked(renamed(tensors, {".block_sparse_moe.": ".mlp."}), config.num_experts)


class PhiMoe(PreNormDecoder[A, W]):
    """Attention, then experts, behind layer norms."""

    def __init__(self, config: SparseConfig, load: Loader[A, W]) -> None:
        hidden, eps, tied = config.hidden_size, config.norm_eps, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding_scale, self.residual_scale = 1.0, 1.0
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)
        ]
        self.norm = load.layer_norm("model.norm", hidden, eps, bias=True)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden, bias=True)


def _layer(config: SparseConfig, index: int, load: Loader[A, W]) -> PreNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return PreNormLayer(
        input_norm=load.layer_norm("input_layernorm", hidden, eps, bias=True),
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
        ),
        mlp_norm=load.layer_norm("post_attention_layernorm", hidden, eps, bias=True),
        mlp=load_feed_forward(config, index, load.within("mlp")),
    )


FAMILY = Family(
    name="phimoe",
    kind="generate",
    hf_architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    hf_config=_hf_config,
    hf_tensors=_tensors,
    decoder=PhiMoe,
    limits="longrope by the length of a sequence: [the server's context](#longrope) decides",
    gguf_architecture="phimoe",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_tensors,
)
