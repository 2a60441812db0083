"""LFM2 with experts (8B-A1B, 24B-A2B): LFM2, with experts in all but the first layers, chosen by corrected scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from lmserve.model.families import lfm2
from lmserve.model.families.expert_tensors import stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import gguf_fields, hf_fields
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.experts import Experts, ExpertSizes, load_experts, load_router
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import SparseConfig

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_dense_layers": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "use_expert_bias": True,
    "norm_eps": 1e-5,
}
# What is added to the sum of the weights.
TINY = 1e-6
EXPERT_NAMES = {
    "ffn_gate_inp": "feed_forward.gate",
    "ffn_gate_exps": "feed_forward.experts.gate_proj",
    "ffn_up_exps": "feed_forward.experts.up_proj",
    "ffn_down_exps": "feed_forward.experts.down_proj",
    "exp_probs_b": "feed_forward.expert_bias",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lfm2MoeConfig(SparseConfig):
    """`conv_bias` as of LFM2; `expert_bias`: scores are corrected before experts are chosen by them."""

    conv_bias: bool
    expert_bias: bool


def _hf_config(raw: dict[str, Any]) -> Lfm2MoeConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    tied = bool(raw.get("tie_embedding", raw.get("tie_word_embeddings", True)))
    fields = hf_fields("lfm2_moe", raw | {"tie_word_embeddings": tied}, eps="norm_eps", default_theta=1e6)
    return Lfm2MoeConfig(
        **fields,
        **lfm2.hf_convs(raw, fields),
        qk_norm=True,
        conv_bias=bool(raw.get("conv_bias", False)),
        num_experts=experts_of(raw, "num_experts"),
        expert_size=int(raw["moe_intermediate_size"]),
        router=Router(
            "corrected_sigmoid",
            int(raw["num_experts_per_tok"]),
            factor=float(raw["routed_scaling_factor"]),
            normalized=bool(raw["norm_topk_prob"]),
            tiny=TINY,
        ),
        sparse=tuple(index >= int(raw["num_dense_layers"]) for index in range(fields["num_layers"])),
        expert_bias=bool(raw["use_expert_bias"]),
    )


def _gguf_config(file: GgufModel) -> Lfm2MoeConfig:
    fields = gguf_fields("lfm2_moe", file, experts=True)
    return Lfm2MoeConfig(
        **fields,
        **lfm2.gguf_convs(file, fields),
        qk_norm=True,
        conv_bias=lfm2.gguf_conv_bias(file),
        num_experts=int(file.value("expert_count")),
        expert_size=int(file.value("expert_feed_forward_length")),
        router=Router(
            "corrected_sigmoid",
            int(file.value("expert_used_count")),
            factor=float(file.value("expert_weights_scale", 1.0)) or 1.0,
            # No key says so: llama.cpp always divides.
            normalized=True,
            tiny=TINY,
        ),
        sparse=tuple(f"blk.{index}.ffn_gate_inp.weight" in file.tensors for index in range(fields["num_layers"])),
        expert_bias=any(name.endswith("exp_probs_b.bias") for name in file.tensors),
    )


def _hf_tensors(tensors: Tensors, config: Lfm2MoeConfig) -> Tensors:
    return stacked(tensors, config.num_experts)


def _gguf_tensors(tensors: Tensors, config: Lfm2MoeConfig) -> Tensors:
    found = stacked(lfm2.gguf_tensors(tensors, config), config.num_experts)
    return {name.replace(".expert_bias.bias", ".expert_bias"): tensor for name, tensor in found.items()}


class Lfm2Moe(lfm2.ConvDecoder[A, W]):
    """Experts in place of feed-forward networks, but in the first layers."""

    def __init__(self, config: Lfm2MoeConfig, load: Loader[A, W]) -> None:
        super().__init__(config, load, lambda index, own: _mlp(config, index, own), conv_bias=config.conv_bias)


def _mlp(config: Lfm2MoeConfig, index: int, load: Loader[A, W]) -> GatedMlp[W] | Experts[W]:
    if not config.sparse[index]:
        return lfm2.load_mlp(config, load)
    hidden, count = config.hidden_size, config.num_experts
    correction = "expert_bias" if config.expert_bias else None
    return Experts(
        router=load_router(load, "gate", config.router, count, hidden, correction=correction),
        experts=load_experts(load.within("experts"), ExpertSizes(count, config.expert_size), hidden),
    )


FAMILY = Family(
    name="lfm2_moe",
    kind="generate",
    hf_architectures=("Lfm2MoeForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=Lfm2Moe,
    gguf_architecture="lfm2moe",
    gguf_config=_gguf_config,
    gguf_names=lfm2.GGUF_NAMES | EXPERT_NAMES,
    gguf_tensors=_gguf_tensors,
)
