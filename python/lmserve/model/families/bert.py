"""BERT encoders that embed or score texts (MiniLM, bge, e5)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmserve.model.activation import named_activation
from lmserve.model.config import AttentionLayer, EncoderConfig, RopeConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.encoder_fields import encoder_config, gguf_sizes, split, within
from lmserve.model.families.family import Family, Tensors
from lmserve.model.gguf_source import RANKS, GgufModel
from lmserve.model.hf_config import required
from lmserve.model.layers.loading import Loader
from lmserve.model.score_head import scores_pairs
from lmserve.model.tensors import DerivedTensor, TensorSource

A = TypeVar("A")
W = TypeVar("W")
F32 = NDArray[np.float32]

# The heads, the pooler and stored constants: none of them takes part in the states.
UNUSED = re.compile(r"(cls|pooler|classifier|lm_head)\..+|embeddings\.(position_ids|token_type_ids)")
MOST_PADDING = 1024
PLACES = "embeddings.places.weight"


def bert_config(raw: dict[str, Any], *, offset: bool = False) -> EncoderConfig:
    """Of config.json. offset: as in RoBERTa, whose table of positions begins with rows that no token has."""
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise CheckpointError(
            f"config.json: position_embedding_type {raw['position_embedding_type']!r} is not supported (absolute is)"
        )
    hidden, heads = int(required(raw, "hidden_size")), int(required(raw, "num_attention_heads"))
    if heads < 1 or hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    positions = int(required(raw, "max_position_embeddings"))
    # The table's first rows are those of padding and of what comes before it.
    first = int(raw.get("pad_token_id", 1)) + 1 if offset else 0
    if not 0 <= first < min(positions, MOST_PADDING):
        raise CheckpointError(f"config.json: pad_token_id is {first - 1}, which leaves no positions of {positions}")
    layers, head_dim = int(required(raw, "num_hidden_layers")), hidden // heads
    config = EncoderConfig(
        architecture="bert",
        vocab_size=int(required(raw, "vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(required(raw, "intermediate_size")),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
        rope=RopeConfig(),
        tie_word_embeddings=True,
        context_length=positions - first,
        activation=named_activation(raw.get("hidden_act", "gelu")),
        num_positions=positions - first,
        padding=tuple(range(first)),
        # The tokenizers of RoBERTa tell no segments apart.
        num_segments=min(2, int(raw.get("type_vocab_size", 2))) if scores_pairs(raw) and not offset else 1,
    )
    attention = AttentionLayer(heads, heads, head_dim, head_dim**-0.5, None, causal=False)
    return replace(config, attention=(attention,) * layers)


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


@dataclass(frozen=True, slots=True)
class BertLayer(Generic[W]):
    """Loaded weights of one layer."""

    qkv: W
    attended: W
    attention_norm: W
    inner: W
    outer: W
    norm: W


class Bert(Generic[A, W]):
    """Attention and a feed-forward network; each is added to what it was given, and the sum is normalised."""

    def __init__(self, config: EncoderConfig, load: Loader[A, W]) -> None:
        hidden = config.hidden_size
        places = (config.num_positions or 0) * (config.num_segments or 0)
        self.ops, self.config = load.ops, config
        self.words = load.embedding("embeddings.word_embeddings", config.vocab_size, hidden, head=False)
        self.places = load.embedding("embeddings.places", places, hidden, head=False)
        self.norm = load.layer_norm("embeddings.LayerNorm", hidden, config.norm_eps, bias=True)
        self.layers = [_layer(config, load.within(f"encoder.layer.{index}")) for index in range(config.num_layers)]

    @property
    def head(self) -> W:
        """There is none."""
        raise TypeError("an encoder makes no logits")

    def forward(self, *, sampled_rows_only: bool) -> A:
        if sampled_rows_only:
            raise TypeError("an encoder samples nothing")
        ops, activation = self.ops, self.config.activation
        states, _ = ops.add_norm(ops.embed_places(self.places), ops.embed(self.words), self.norm)
        for index, layer in enumerate(self.layers):
            query = ops.rope_and_cache(ops.linear(states, layer.qkv), index)
            attended = ops.linear(ops.attention(query, index), layer.attended)
            states, _ = ops.add_norm(attended, states, layer.attention_norm)
            inner = ops.activate(ops.linear(states, layer.inner), activation)
            states, _ = ops.add_norm(ops.linear(inner, layer.outer), states, layer.norm)
        return states


def _layer(config: EncoderConfig, load: Loader[A, W]) -> BertLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    own, output = load.within("attention.self"), load.within("attention.output")
    return BertLayer(
        qkv=own.linear(dict.fromkeys(("query", "key", "value"), hidden), hidden, bias=True),
        attended=output.linear({"dense": hidden}, hidden, bias=True),
        attention_norm=output.layer_norm("LayerNorm", hidden, eps, bias=True),
        inner=load.linear({"intermediate.dense": config.intermediate_size}, hidden, bias=True),
        outer=load.linear({"output.dense": hidden}, config.intermediate_size, bias=True),
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
