"""The tensors of latent attention as they are loaded: rotated pairs half apart, kv_b_proj taken apart by heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from lmserve.model.expert_tensors import HeadsTensor
from lmserve.model.families.family import Tensors
from lmserve.model.layers.latent_attention import LatentSizes

GGUF_NAMES: Final[Mapping[str, str]] = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
}
_ATTENTION: Final = re.compile(r"(model\.layers\.\d+\.self_attn)\.(\w+)\.(weight|bias)")


def latent_tensors(tensors: Tensors, sizes: LatentSizes, *, interleaved: bool) -> Tensors:
    """The tensors, in whose stored form rotated pairs are adjacent where `interleaved`."""
    pairs = np.arange(sizes.rope)
    end = np.concatenate((pairs[::2], pairs[1::2])) if interleaved else pairs
    head = np.concatenate((np.arange(sizes.nope), sizes.nope + end))
    found: Tensors = {}
    for name, tensor in tensors.items():
        match = _ATTENTION.fullmatch(name)
        part = "" if match is None else match[2]
        if part == "kv_b_proj" and match is not None:
            key, value = slice(0, sizes.nope), slice(sizes.nope, sizes.nope + sizes.value)
            found[f"{match[1]}.k_b_proj.weight"] = HeadsTensor(tensor, sizes.heads, key, transposed=True)
            found[f"{match[1]}.v_b_proj.weight"] = HeadsTensor(tensor, sizes.heads, value)
        elif interleaved and part == "kv_a_proj_with_mqa":
            found[name] = tensor.select_rows(np.concatenate((np.arange(sizes.rank), sizes.rank + end)))
        elif interleaved and part in ("q_proj", "q_b_proj"):
            starts = np.arange(sizes.heads)[:, None] * len(head)
            found[name] = tensor.select_rows((starts + head).reshape(-1))
        else:
            found[name] = tensor
    return found
