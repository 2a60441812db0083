"""InternLM2 and 2.5: Llama under other names, with q, k and v of each key-value head stored together."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import hf_fields
from lmserve.model.families.llama import Llama, gguf_config

GLOBAL_NAMES = {"model.tok_embeddings": "model.embed_tokens", "model.norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)")


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    bias = bool(raw.get("bias", False))
    return ModelConfig(**hf_fields("internlm2", raw), attention_bias=bias, output_bias=bias)


def _hf_tensors(tensors: Tensors, config: ModelConfig) -> Tensors:
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        layer = LAYER.fullmatch(stem)
        if stem in GLOBAL_NAMES:
            renamed[f"{GLOBAL_NAMES[stem]}.{kind}"] = tensor
        elif layer and layer[2] in LAYER_NAMES:
            renamed[f"{layer[1]}.{LAYER_NAMES[layer[2]]}.{kind}"] = tensor
        elif layer and layer[2] == "attention.wqkv":
            rows = config.q_size + 2 * config.kv_size
            if tensor.shape[0] != rows:
                raise CheckpointError(f"tensor {name} has {tensor.shape[0]} rows, the configuration needs {rows}")
            for projection, order in _split_rows(config).items():
                renamed[f"{layer[1]}.self_attn.{projection}.{kind}"] = tensor.select_rows(order)
        else:
            renamed[name] = tensor
    return renamed


def _split_rows(config: ModelConfig) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Rows of q, k and v in wqkv: for each key-value head its group of query heads, then its key and its value."""
    group = config.num_heads // config.num_kv_heads
    rows = np.arange(config.q_size + 2 * config.kv_size).reshape(config.num_kv_heads, group + 2, config.head_dim)
    return {
        "q_proj": rows[:, :group].reshape(-1),
        "k_proj": rows[:, group].reshape(-1),
        "v_proj": rows[:, group + 1].reshape(-1),
    }


FAMILY = Family(
    name="internlm2",
    kind="generate",
    hf_architectures=("InternLM2ForCausalLM",),
    hf_config=_hf_config,
    decoder=Llama,
    hf_tensors=_hf_tensors,
    gguf_architecture="internlm2",
    gguf_config=gguf_config,
    gguf_interleaved_rope=True,
)
