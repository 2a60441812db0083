"""Qwen3-Next and Qwen3-Coder-Next (80B-A3B): gated delta nets and attention as in Qwen3.5, which came after it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmserve.model.errors import CheckpointError
from lmserve.model.families.expert_tensors import GGUF_NAMES as EXPERT_NAMES
from lmserve.model.families.expert_tensors import stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.qwen3_5 import GGUF_NAMES, gated_queries, head_tensors, hf_hybrid, shifted_norms
from lmserve.model.families.qwen3_5_moe import (
    SHARED_NAMES,
    QwenSparseHybrid,
    gguf_sparse,
    gguf_tensors,
    sparse_config,
    sparse_mtp,
)
from lmserve.model.families.recurrent_tensors import decay_tensors
from lmserve.model.gguf_source import GgufModel
from lmserve.model.sparse_config import SparseConfig
from lmserve.model.tensors import TensorSource

DEFAULTS: dict[str, Any] = {
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
}
# The first is of older files, which have it in place of attn_qkv and attn_gate.
OWN_NAMES = {"ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba"}


def _hf_config(raw: dict[str, Any]) -> SparseConfig:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    fields = hf_hybrid("qwen3_next", raw)
    step, dense = int(raw["decoder_sparse_step"]), set(raw["mlp_only_layers"])
    sparse = tuple(index not in dense and (index + 1) % step == 0 for index in range(fields["num_layers"]))
    return sparse_config(fields, raw, normalized=bool(raw["norm_topk_prob"]), sparse=sparse)


def _gguf_config(file: GgufModel) -> SparseConfig:
    return gguf_sparse("qwen3_next", file, tiled=False)


def _hf_tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    kept = stacked(shifted_norms(decay_tensors(head_tensors(tensors, config))), config.num_experts)
    return gated_queries(separated(kept, config), config)


def _gguf_tensors(tensors: Tensors, config: SparseConfig) -> Tensors:
    return gguf_tensors(separated(tensors, config), config)


def separated(tensors: Tensors, config: SparseConfig) -> Tensors:
    """The tensors with in_proj_qkvz and in_proj_ba, which stand by key heads, as those that Qwen3.5 has.

    A key head's rows are q | k | v | z and b | a, the latter four of all value heads that go with it.
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.partition(".linear_attn.")
        if last not in ("in_proj_qkvz.weight", "in_proj_ba.weight"):
            found[name] = tensor
            continue
        layer = config.recurrent[_place(config, int(prefix.rpartition(".")[2]))]
        keys = (layer.channels - layer.heads * layer.columns) // (2 * layer.rows)
        if last == "in_proj_ba.weight":
            parts = {"in_proj_b": (0, 1), "in_proj_a": (1, 1)}
            widths = [layer.heads // keys] * 2
        else:
            parts = {"in_proj_qkv": (0, 3), "in_proj_z": (3, 1)}
            values = layer.heads // keys * layer.columns
            widths = [layer.rows, layer.rows, values, values]
        for part, (first, count) in parts.items():
            found[f"{prefix}.linear_attn.{part}.weight"] = _by_parts(tensor, keys, widths, first, count)
    return found


def _place(config: SparseConfig, index: int) -> int:
    place = index - sum(other < index for other in config.attention_places)
    if index in config.attention_places or place >= len(config.recurrent):
        raise CheckpointError(f"layer {index} has tensors of a delta net, but is none")
    return place


def _by_parts(tensor: TensorSource, keys: int, widths: list[int], first: int, count: int) -> TensorSource:
    """Of rows that stand by key heads, each with parts of these widths, `count` parts, each of all key heads."""
    if tensor.shape[0] != keys * sum(widths):
        raise CheckpointError(f"tensor {tensor.name} must have {keys * sum(widths)} rows, but has {tensor.shape[0]}")
    starts = np.cumsum([0, *widths])
    heads = np.arange(keys)[:, None] * sum(widths)
    chosen = [(heads + np.arange(starts[at], starts[at + 1])).reshape(-1) for at in range(first, first + count)]
    return tensor.select_rows(np.concatenate(chosen))


FAMILY = Family(
    name="qwen3_next",
    kind="generate",
    hf_architectures=("Qwen3NextForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
    decoder=QwenSparseHybrid,
    gguf_architecture="qwen3next",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES | dict(EXPERT_NAMES) | SHARED_NAMES | OWN_NAMES,
    gguf_tensors=_gguf_tensors,
    mtp=sparse_mtp,
)
