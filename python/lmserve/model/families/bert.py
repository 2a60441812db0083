"""BERT encoders that embed or score texts (MiniLM, bge, e5)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmserve.model.config import EncoderConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.encoder_fields import encoder_config, gguf_sizes, split, within
from lmserve.model.families.family import Family, Tensors
from lmserve.model.gguf_source import RANKS, GgufModel
from lmserve.model.hf_config import required
from lmserve.model.layers.attention import SelfAttention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import load_plain_mlp
from lmserve.model.layers.post_norm import PostNormEncoder, PostNormLayer
from lmserve.model.score_head import scores_pairs
from lmserve.model.tensors import DerivedTensor, TensorSource

A = TypeVar("A")
W = TypeVar("W")
F32 = NDArray[np.float32]

# The heads, the pooler and stored constants: none of them takes part in the states.
UNUSED = re.compile(r"(cls|pooler|classifier|lm_head)\..+|embeddings\.(position_ids|token_type_ids)")
MOST_PADDING = 1024
PLACES = "embeddings.places.weight"
# The feed-forward network's, in each layer.
MLP = ("intermediate.dense", "output.dense")


def bert_config(raw: dict[str, Any], *, offset: bool = False) -> EncoderConfig:
    """Of config.json. offset: as in RoBERTa, whose table of positions begins with rows that no token has."""
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise CheckpointError(
            f"config.json: position_embedding_type {raw['position_embedding_type']!r} is not supported (absolute is)"
        )
    positions = int(required(raw, "max_position_embeddings"))
    # The table's first rows are those of padding and of what comes before it.
    first = int(raw.get("pad_token_id", 1)) + 1 if offset else 0
    if not 0 <= first < min(positions, MOST_PADDING):
        raise CheckpointError(f"config.json: pad_token_id is {first - 1}, which leaves no positions of {positions}")
    return encoder_config(
        "bert",
        raw,
        context_length=positions - first,
        ropes=[None] * int(required(raw, "num_hidden_layers")),
        num_positions=positions - first,
        padding=tuple(range(first)),
        # The tokenizers of RoBERTa tell no segments apart.
        num_segments=min(2, int(raw.get("type_vocab_size", 2))) if scores_pairs(raw) and not offset else 1,
    )


def bert_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    """Those that take part in the states, with the tables of positions and of segments as one."""
    renamed = {re.sub(r"^(bert|roberta)\.", "", name): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in renamed.items() if not UNUSED.fullmatch(name)}
    positions, segments = config.num_positions or 0, config.num_segments or 0
    for name, rows in (("position", len(config.padding) + positions), ("token_type", segments)):
        found = kept.get(f"embeddings.{name}_embeddings.weight")
        if found is None:
            raise CheckpointError(f"tensor embeddings.{name}_embeddings.weight is missing")
        if len(found.shape) != 2 or found.shape[1] != config.hidden_size or found.shape[0] < rows:
            raise CheckpointError(
                f"tensor {found.name} has shape {list(found.shape)}, the configuration needs"
                f" {[rows, config.hidden_size]}"
            )
    places = kept.pop("embeddings.position_embeddings.weight").select_rows(len(config.padding) + np.arange(positions))
    types = kept.pop("embeddings.token_type_embeddings.weight").select_rows(np.arange(segments))
    kept[PLACES] = PlaceTable(places, types)
    return kept


@dataclass(frozen=True, slots=True)
class PlaceTable(DerivedTensor):
    """The sums of each segment's embedding and each position's, which are `source`, segment after segment."""

    segments: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[0] * self.segments.shape[0], self.source.shape[1])

    def dequantize(self) -> F32:
        sums: F32 = self.segments.dequantize()[:, None, :] + self.source.dequantize()[None, :, :]
        return sums.reshape(self.shape)

    def select_rows(self, rows: NDArray[np.int64]) -> NoReturn:
        raise NotImplementedError(f"{len(rows)} rows of {self.name} are not wanted by anyone")


class Bert(PostNormEncoder[A, W]):
    """Words, positions and segments; then layers with a feed-forward network without a gate."""

    def __init__(self, config: EncoderConfig, load: Loader[A, W]) -> None:
        rows = (config.num_positions or 0) * (config.num_segments or 0)
        layers = load.within("encoder.layer")
        super().__init__(config, load, ("places", rows), lambda index: _layer(config, layers.within(f"{index}")))


def _layer(config: EncoderConfig, load: Loader[A, W]) -> PostNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    own, output = load.within("attention.self"), load.within("attention.output")
    return PostNormLayer(
        attention=SelfAttention(
            qkv=own.linear(dict.fromkeys(("query", "key", "value"), hidden), hidden, bias=True),
            output=output.linear({"dense": hidden}, hidden, bias=True),
        ),
        attention_norm=output.layer_norm("LayerNorm", hidden, eps, bias=True),
        mlp=load_plain_mlp(load, MLP, hidden, config.intermediate_size, bias=True),
        norm=load.layer_norm("output.LayerNorm", hidden, eps, bias=True),
    )


GGUF_NAMES = {
    "token_embd": "embeddings.word_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "token_types": "embeddings.token_type_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "attn_qkv": "attention.self.qkv",
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}


def _gguf_config(file: GgufModel) -> EncoderConfig:
    """Of BERT, and of RoBERTa without the rows of its table of positions that no token has."""
    positions, types = (file.tensors.get(f"{name}.weight") for name in ("position_embd", "token_types"))
    rows = 0 if positions is None else positions.shape[0]
    context = min(int(file.value("context_length")), rows)
    if context < 1:
        raise CheckpointError(f"{file.path}: there are {rows} positions for a context of {context}")
    pairs = file.lookup("bert.pooling_type") == RANKS and file.lookup("tokenizer.ggml.model") == "bert"
    return encoder_config(
        "bert",
        gguf_sizes(file),
        context_length=context,
        ropes=[None] * int(file.value("block_count")),
        num_positions=context,
        num_segments=min(2, types.shape[0]) if pairs and types is not None else 1,
    )


def _gguf_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    return bert_tensors(split(within(tensors, "encoder.layer."), "qkv", ("query", "key", "value")), config)


FAMILY = Family(
    name="bert",
    kind="embed",
    hf_architectures=("BertModel", "BertForMaskedLM", "BertForSequenceClassification"),
    hf_config=bert_config,
    decoder=Bert,
    hf_tensors=bert_tensors,
    gguf_architecture="bert",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_gguf_tensors,
)
