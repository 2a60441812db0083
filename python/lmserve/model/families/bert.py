"""BERT encoders that embed text, as sentence-transformers ships them (MiniLM)."""

from __future__ import annotations

import re
from typing import Any

from lmserve.model.config import EncoderConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family, Tensors
from lmserve.model.hf_config import required

# The masked-language-model head, the pooler and a stored constant: none of them takes part in an embedding.
UNUSED = re.compile(r"(cls|pooler)\..+|embeddings\.position_ids")
ACTIVATIONS = ("gelu", "gelu_new", "relu")


def _hf_config(raw: dict[str, Any]) -> EncoderConfig:
    activation = str(raw.get("hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not supported ({', '.join(ACTIVATIONS)} are)")
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise CheckpointError(
            f"config.json: position_embedding_type {raw['position_embedding_type']!r} is not supported (absolute is)"
        )
    positions = int(required(raw, "max_position_embeddings"))
    return EncoderConfig(
        architecture="bert",
        vocab_size=int(required(raw, "vocab_size")),
        hidden_size=int(required(raw, "hidden_size")),
        intermediate_size=int(required(raw, "intermediate_size")),
        num_layers=int(required(raw, "num_hidden_layers")),
        num_heads=int(required(raw, "num_attention_heads")),
        layer_norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
        activation=activation,
        num_positions=positions,
        num_token_types=int(raw.get("type_vocab_size", 2)),
        pooling="mean",
        context_length=positions,
    )


def _hf_tensors(tensors: Tensors, _config: EncoderConfig) -> Tensors:
    renamed = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in renamed.items() if not UNUSED.fullmatch(name)}


def expected_tensors(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every tensor that an encoder of this configuration has."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (config.num_positions, hidden),
        "embeddings.token_type_embeddings.weight": (config.num_token_types, hidden),
    }
    norms = ["embeddings.LayerNorm"]
    for index in range(config.num_layers):
        layer = f"encoder.layer.{index}"
        linears = {
            "attention.self.query": (hidden, hidden),
            "attention.self.key": (hidden, hidden),
            "attention.self.value": (hidden, hidden),
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (inner, hidden),
            "output.dense": (hidden, inner),
        }
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)
    return shapes


FAMILY = Family(
    name="bert",
    kind="embed",
    hf_architectures=("BertModel", "BertForMaskedLM"),
    hf_config=_hf_config,
    hf_tensors=_hf_tensors,
)
