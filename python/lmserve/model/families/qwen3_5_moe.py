"""Qwen3.5 and 3.6 with experts (35B-A3B to 397B-A17B): gated delta nets and attention, and experts in all layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from lmserve.model.families.expert_tensors import GGUF_NAMES as EXPERT_NAMES
from lmserve.model.families.expert_tensors import stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.qwen3_5 import (
    GGUF_NAMES,
    QwenHybrid,
    gated_queries,
    gguf_hybrid,
    gguf_recurrent,
    head_tensors,
    hf_hybrid,
    shifted_norms,
)
from lmserve.model.families.recurrent_tensors import decay_tensors
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.experts import Experts, ExpertSizes, load_experts, load_router
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, load_gated_mlp
from lmserve.model.router import Router, experts_of
from lmserve.model.sparse_config import SparseConfig
from lmserve.model.tensors import StoredTensor

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {
    "num_experts_per_tok": 8,
    "num_experts": 256,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    # No network is computed with it.
    "intermediate_size": 512,
}
SHARED_NAMES = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


def _hf_config(raw: dict[str, Any]) -> SparseConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    fields = hf_hybrid("qwen3_5_moe", raw)
    return sparse_config(fields, raw, normalized=True, sparse=(True,) * fields["num_layers"])


def sparse_config(
    fields: dict[str, Any], raw: dict[str, Any], *, normalized: bool, sparse: tuple[bool, ...]
) -> SparseConfig:
    """The configuration of Qwen's hybrids with experts."""
    return SparseConfig(
        **fields,
        num_experts=experts_of(raw, "num_experts"),
        expert_size=int(raw["moe_intermediate_size"]),
        shared_size=int(raw["shared_expert_intermediate_size"]),
        router=Router("softmax", int(raw["num_experts_per_tok"]), normalized=normalized),
        sparse=sparse,
    )


def sparse_mtp(config: SparseConfig) -> SparseConfig:
    """The configuration with a head that guesses a token ahead, whose layer has experts."""
    return config.with_mtp(sparse=(*config.sparse, True))


def _gguf_config(file: GgufModel) -> SparseConfig:
    return gguf_sparse("qwen3_5_moe", file, tiled=True)


def gguf_sparse(family: str, file: GgufModel, *, tiled: bool) -> SparseConfig:
    """The configuration of Qwen's hybrids with experts."""
    fields = gguf_hybrid(family, file, tiled=tiled, experts=True)
    size = int(file.value("expert_feed_forward_length"))
    return SparseConfig(
        **fields,
        num_experts=int(file.value("expert_count")),
        expert_size=size,
        shared_size=int(file.value("expert_shared_feed_forward_length", size)),
        router=Router("softmax", int(file.value("expert_used_count")), normalized=True),
        sparse=tuple(f"blk.{index}.ffn_gate_inp.weight" in file.tensors for index in range(fields["num_layers"])),
    )


def _hf_tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    kept = stacked(shifted_norms(decay_tensors(head_tensors(tensors, config))), config.num_experts)
    return gated_queries(kept, config)


def gguf_tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    """The tensors of a GGUF file under the names and in the shapes that are loaded."""
    found = stacked(gguf_recurrent(tensors, config), config.num_experts)
    for name, tensor in found.items():
        if name.endswith("shared_expert_gate.weight") and isinstance(tensor, StoredTensor) and len(tensor.shape) == 1:
            shape = (1, *tensor.shape)
            found[name] = replace(tensor, shape=shape, data=tensor.data.reshape(shape))
    return gated_queries(found, config)


class QwenSparseHybrid(QwenHybrid[A, W]):
    """Experts in place of feed-forward networks, and a shared one, which has a gate."""

    def __init__(self, config: SparseConfig, load: Loader[A, W]) -> None:
        super().__init__(config, load, lambda index, own: _mlp(config, index, own))


def _mlp(config: SparseConfig, index: int, load: Loader[A, W]) -> GatedMlp[W] | Experts[W]:
    hidden = config.hidden_size
    if not config.sparse[index]:
        return load_gated_mlp(load, hidden, config.intermediate_size)
    assert config.shared_size is not None
    return Experts(
        router=load_router(load, "gate", config.router, config.num_experts, hidden),
        experts=load_experts(
            load.within("experts"), ExpertSizes(config.num_experts, config.expert_size), hidden, config.activation
        ),
        shared=load_gated_mlp(load.within("shared_expert"), hidden, config.shared_size),
        shared_gate=load.linear({"shared_expert_gate": 1}, hidden),
        activation=config.activation,
    )


FAMILY = Family(
    name="qwen3_5_moe",
    kind="generate",
    hf_architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=QwenSparseHybrid,
    gguf_architecture="qwen35moe",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES | dict(EXPERT_NAMES) | SHARED_NAMES,
    gguf_tensors=gguf_tensors,
    mtp=sparse_mtp,
)
