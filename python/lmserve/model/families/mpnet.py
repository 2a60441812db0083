"""MPNet (all-mpnet-base-v2): BERT whose attention adds to scores by how far two tokens lie apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmserve.model.config import EncoderConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.encoder_fields import encoder_config, renamed
from lmserve.model.families.family import Family, Tensors
from lmserve.model.hf_config import required
from lmserve.model.layers.loading import Loader
from lmserve.model.tensors import DerivedTensor

A = TypeVar("A")
W = TypeVar("W")
F32 = NDArray[np.float32]

BUCKETS = 32
# Tokens this far apart and further share a bucket.
FARTHEST = 128
# The table of positions begins with rows that no token has: of padding, and of what comes before it.
PADDING = 2
DISTANCES = "encoder.distances.weight"


def _hf_config(raw: dict[str, Any]) -> EncoderConfig:
    positions, layers = int(required(raw, "max_position_embeddings")), int(required(raw, "num_hidden_layers"))
    if positions <= PADDING:
        raise CheckpointError(f"config.json: max_position_embeddings is {positions}; it must be more than {PADDING}")
    if int(raw.get("relative_attention_num_buckets", BUCKETS)) != BUCKETS:
        given = raw["relative_attention_num_buckets"]
        raise CheckpointError(f"config.json: relative_attention_num_buckets {given} is not supported ({BUCKETS} is)")
    return encoder_config(
        "mpnet",
        raw,
        context_length=positions - PADDING,
        ropes=[None] * layers,
        num_positions=positions - PADDING,
        padding=tuple(range(PADDING)),
    )


def _hf_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    found = renamed(tensors, "mpnet", ())
    table, positions = "encoder.relative_attention_bias.weight", "embeddings.position_embeddings.weight"
    for name, shape in ((table, (BUCKETS, config.num_heads)), (positions, (None, config.hidden_size))):
        tensor = found.get(name)
        if tensor is None:
            raise CheckpointError(f"tensor {name} is missing")
        rows = PADDING + (config.num_positions or 0) if shape[0] is None else shape[0]
        if len(tensor.shape) != 2 or tensor.shape[1] != shape[1] or tensor.shape[0] < rows:
            needed = [rows, shape[1]]
            raise CheckpointError(f"tensor {tensor.name} has shape {list(tensor.shape)}, {needed} is needed")
    used = PADDING + np.arange(config.num_positions or 0)
    found[positions] = found[positions].select_rows(used)
    found[DISTANCES] = ByDistance(found.pop(table), config.num_positions or 0)
    return found


def buckets(longest: int) -> NDArray[np.int64]:
    """[2 * longest - 1]: the bucket of keys that lie 1 - longest .. longest - 1 after their query (as T5 has it)."""
    after = np.arange(1 - longest, longest)
    half, exact = BUCKETS // 2, BUCKETS // 4
    apart = np.abs(after)
    with np.errstate(divide="ignore"):
        scaled = np.log(apart.astype(np.float32) / exact) / np.float32(math.log(FARTHEST / exact)) * (half - exact)
    far = np.minimum(exact + np.where(apart < exact, 0, scaled).astype(np.int64), half - 1)
    found: NDArray[np.int64] = np.where(after > 0, half, 0) + np.where(apart < exact, apart, far)
    return found


@dataclass(frozen=True, slots=True)
class ByDistance(DerivedTensor):
    """[heads, 2 * longest - 1] of a table [buckets, heads]: what is added to scores by distance."""

    longest: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[1], 2 * self.longest - 1)

    def dequantize(self) -> F32:
        return np.ascontiguousarray(self.source.dequantize()[buckets(self.longest)].T)


@dataclass(frozen=True, slots=True)
class MpnetLayer(Generic[W]):
    """Loaded weights of one layer."""

    qkv: W
    attended: W
    attention_norm: W
    inner: W
    outer: W
    norm: W


class Mpnet(Generic[A, W]):
    """Attention and a feed-forward network; each is added to what it was given, and the sum is normalised."""

    def __init__(self, config: EncoderConfig, load: Loader[A, W]) -> None:
        hidden, positions = config.hidden_size, config.num_positions
        if positions is None:
            raise TypeError("MPNet has a table of positions")
        self.ops, self.config = load.ops, config
        self.words = load.embedding("embeddings.word_embeddings", config.vocab_size, hidden, head=False)
        self.places = load.embedding("embeddings.position_embeddings", positions, hidden, head=False)
        self.norm = load.layer_norm("embeddings.LayerNorm", hidden, config.norm_eps, bias=True)
        self.distances = load.distances(DISTANCES, config.num_heads, positions)
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
            attended = ops.linear(ops.attention(query, index, None, self.distances), layer.attended)
            states, _ = ops.add_norm(attended, states, layer.attention_norm)
            inner = ops.activate(ops.linear(states, layer.inner), activation)
            states, _ = ops.add_norm(ops.linear(inner, layer.outer), states, layer.norm)
        return states


def _layer(config: EncoderConfig, load: Loader[A, W]) -> MpnetLayer[W]:
    hidden, eps, own = config.hidden_size, config.norm_eps, load.within("attention.attn")
    return MpnetLayer(
        qkv=own.linear(dict.fromkeys(("q", "k", "v"), hidden), hidden, bias=True),
        attended=own.linear({"o": hidden}, hidden, bias=True),
        attention_norm=load.layer_norm("attention.LayerNorm", hidden, eps, bias=True),
        inner=load.linear({"intermediate.dense": config.intermediate_size}, hidden, bias=True),
        outer=load.linear({"output.dense": hidden}, config.intermediate_size, bias=True),
        norm=load.layer_norm("output.LayerNorm", hidden, eps, bias=True),
    )


FAMILY = Family(
    name="mpnet",
    kind="embed",
    hf_architectures=("MPNetModel", "MPNetForMaskedLM", "MPNetForSequenceClassification"),
    hf_config=_hf_config,
    decoder=Mpnet,
    hf_tensors=_hf_tensors,
)
