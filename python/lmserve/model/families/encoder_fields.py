"""What encoders read alike from config.json and from GGUF keys, and what they do with their tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmserve.model.activation import named_activation
from lmserve.model.config import AttentionLayer, EncoderConfig, RopeConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Tensors
from lmserve.model.gguf_source import GgufModel
from lmserve.model.hf_config import required
from lmserve.model.tensors import TensorSource

# The heads, the pooler and stored constants: none of them takes part in the states.
UNUSED = re.compile(r"(cls|pooler|classifier|lm_head|head|decoder)\..+|embeddings\.(position_ids|token_type_ids)")


def encoder_config(
    family: str,
    raw: dict[str, Any],
    *,
    context_length: int,
    ropes: Sequence[RopeConfig | None],
    windows: Sequence[int | None] | None = None,
    activation: str = "hidden_act",
    eps: str = "layer_norm_eps",
    **others: Any,
) -> EncoderConfig:
    """Of config.json, `raw`. ropes and windows: of each layer; activation, eps: their keys; others: further fields."""
    hidden, heads = int(required(raw, "hidden_size")), int(required(raw, "num_attention_heads"))
    if heads < 1 or hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = hidden // heads
    layers = zip(ropes, windows or [None] * len(ropes), strict=True)
    return EncoderConfig(
        architecture=family,
        vocab_size=int(required(raw, "vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(required(raw, "intermediate_size")),
        num_layers=len(ropes),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        norm_eps=float(raw.get(eps, 1e-12)),
        rope=next((rope for rope in ropes if rope is not None), RopeConfig()),
        tie_word_embeddings=True,
        context_length=context_length,
        activation=named_activation(raw.get(activation, "gelu")),
        attention=tuple(
            AttentionLayer(heads, heads, head_dim, head_dim**-0.5, rope, window=window, causal=False)
            for rope, window in layers
        ),
        **others,
    )


def gguf_sizes(file: GgufModel) -> dict[str, Any]:
    """What config.json would say of the sizes of a GGUF file's encoder; all have an epsilon of layer norms."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": int(file.value("embedding_length")),
        "intermediate_size": int(file.value("feed_forward_length")),
        "num_attention_heads": int(file.value("attention.head_count")),
        "layer_norm_eps": float(file.value("attention.layer_norm_epsilon")),
    }


def within(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors with this in place of what begins the names of layers of GGUF files."""
    return {re.sub(r"^model\.layers\.", prefix, name): tensor for name, tensor in tensors.items()}


def renamed(tensors: Tensors, prefix: str, names: Sequence[tuple[str, str]]) -> Tensors:
    """Those that take part in the states: without `prefix`, a pattern, and with each pattern of `names` replaced."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        own = re.sub(rf"^({prefix})\.", "", name)
        if UNUSED.fullmatch(own):
            continue
        for pattern, replacement in names:
            own = re.sub(pattern, replacement, own)
        found[own] = tensor
    return found


def split(tensors: Tensors, fused: str, parts: Sequence[str]) -> Tensors:
    """The tensors with each module `fused` (the end of its name) cut into `parts` of as many rows, in this order."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if not module.endswith(f".{fused}"):
            found[name] = tensor
            continue
        if tensor.shape[0] % len(parts):
            raise CheckpointError(f"tensor {tensor.name} has {tensor.shape[0]} rows, which are not {len(parts)} parts")
        rows = np.arange(tensor.shape[0], dtype=np.int64).reshape(len(parts), -1)
        before = module.removesuffix(fused)
        found |= {f"{before}{part}.{kind}": tensor.select_rows(own) for part, own in zip(parts, rows, strict=True)}
    return found


def segment_rows(tensors: Tensors, name: str, config: EncoderConfig) -> TensorSource:
    """The rows of the table of segments that are used."""
    found = tensors.get(name)
    if found is None:
        raise CheckpointError(f"tensor {name} is missing")
    rows = config.num_segments or 0
    if len(found.shape) != 2 or found.shape[0] < rows:
        raise CheckpointError(f"tensor {found.name} has shape {list(found.shape)}, but {rows} rows are needed")
    return found.select_rows(np.arange(rows))
