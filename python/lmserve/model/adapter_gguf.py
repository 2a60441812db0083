"""Adapters for GGUF files: PEFT's modules under the names of the file's tensors, their rows in its order.

llama.cpp's converter stores q and k of some families with each rotated pair in adjacent rows (`LlamaModel.permute` in
its convert_hf_to_gguf.py), so B of an adapter for these layers is reordered in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from lmserve.model.adapter_files import Adapter, LowRank
from lmserve.model.config import ModelConfig
from lmserve.model.errors import AdapterError
from lmserve.model.families.family import Family
from lmserve.model.gguf_source import LAYER_NAMES

# Linear layers that the converter stores as transformers has them, but for the order of rows.
PLAIN: Final = (
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "attn_q_a", "attn_q_b", "attn_kv_a_mqa"),
    *("ffn_gate", "ffn_up", "ffn_down", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    *("inp_gate", "proj", "shortconv.in_proj", "shortconv.out_proj"),
)
# Those of which a recurrent layer's converter turns heads around.
NOT_RECURRENT: Final = ("attn_qkv",)
PERMUTED: Final = ("attn_q", "attn_k")


def for_gguf(adapter: Adapter, family: Family, config: ModelConfig, linears: Collection[str]) -> Adapter:
    """Convert an adapter for a GGUF file of a family with these linear layers.

    Raises AdapterError for a module that it cannot change there.
    """
    if family.gguf_folds_factors:
        raise AdapterError(f"adapters of GGUF files of {family.name} are not supported; of its safetensors they are")
    names = LAYER_NAMES | dict(family.gguf_names)
    # A file's own tensors, without the number of their layer.
    own_stems = {linear.split(".", 2)[2] for linear in linears}
    plain = [stem for stem in PLAIN if stem in own_stems and not (config.recurrent and stem in NOT_RECURRENT)]
    stems = {names[stem]: stem for stem in plain if stem in names}
    permuted = family.gguf_interleaved_rope and not family.hf_interleaved_rope
    modules: dict[str, LowRank] = {}
    for module, own in adapter.modules.items():
        _, layer, rest = module.split(".", 2) if module.count(".") > 1 else ("", "", module)
        stem = stems.get(rest)
        if stem is None:
            raise AdapterError(f"{adapter.path}: it changes {module}, {_why_not(stems, family)}")
        reordered = permuted and stem in PERMUTED
        modules[f"blk.{layer}.{stem}"] = _permuted(own, config.attention[0].head_dim) if reordered else own
    return replace(adapter, modules=modules)


def _permuted(own: LowRank, head_dim: int) -> LowRank:
    rows = len(own.up)
    if rows % head_dim:
        # The check against the model's shapes says so.
        return own
    order = np.arange(rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    return replace(own, up=np.ascontiguousarray(own.up[order]))


def _why_not(stems: Mapping[str, str], family: Family) -> str:
    return f"but in GGUF files of {family.name} an adapter can change only: {', '.join(sorted(stems))}"
