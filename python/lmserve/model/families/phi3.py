"""Phi-3, 3.5 and 4 (mini): Llama with q, k, v and gate, up stored as one tensor each, partial rotation and longrope."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import attention_layers, gguf_fields, gguf_windows, hf_fields, hf_windows
from lmserve.model.families.llama import Llama
from lmserve.model.gguf_source import GgufModel

FUSED = re.compile(r"(model\.layers\.\d+)\.(self_attn\.qkv_proj|mlp\.gate_up_proj)\.(weight|bias)")


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    fields = hf_fields("phi3", raw)
    return ModelConfig(**fields, attention=attention_layers(fields, windows=hf_windows(raw)))


def _gguf_config(file: GgufModel) -> ModelConfig:
    fields = gguf_fields("phi3", file)
    return ModelConfig(**fields, attention=attention_layers(fields, windows=gguf_windows(file, period=0)))


def _parts(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Under the names of Llama."""
    sizes = {
        "self_attn.qkv_proj": {
            "self_attn.q_proj": config.q_size,
            "self_attn.k_proj": config.kv_size,
            "self_attn.v_proj": config.kv_size,
        },
        "mlp.gate_up_proj": {"mlp.gate_proj": config.intermediate_size, "mlp.up_proj": config.intermediate_size},
    }
    split: Tensors = {}
    for name, tensor in tensors.items():
        fused = FUSED.fullmatch(name)
        if fused is None:
            split[name] = tensor
            continue
        first, parts = 0, sizes[fused[2]]
        if tensor.shape[0] != sum(parts.values()):
            raise CheckpointError(
                f"tensor {name} has {tensor.shape[0]} rows, the configuration needs {sum(parts.values())}"
            )
        for part, rows in parts.items():
            split[f"{fused[1]}.{part}.{fused[3]}"] = tensor.select_rows(np.arange(first, first + rows))
            first += rows
    return split


FAMILY = Family(
    name="phi3",
    kind="generate",
    hf_architectures=("Phi3ForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=_parts,
    decoder=Llama,
    limits="longrope by the length of a sequence: [the server's context](#longrope) decides",
    gguf_architecture="phi3",
    gguf_config=_gguf_config,
    gguf_names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    gguf_tensors=_parts,
)
