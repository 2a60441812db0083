"""MPNet (all-mpnet-base-v2): BERT whose attention adds to scores by how far two tokens lie apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmserve.model.config import EncoderConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.bert import MLP
from lmserve.model.families.encoder_fields import encoder_config, renamed
from lmserve.model.families.family import Family, Tensors
from lmserve.model.hf_config import required
from lmserve.model.layers.attention import SelfAttention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import load_plain_mlp
from lmserve.model.layers.post_norm import PostNormEncoder, PostNormLayer
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


class Mpnet(PostNormEncoder[A, W]):
    """BERT's layers, which have one table of distances for all of them."""

    def __init__(self, config: EncoderConfig, load: Loader[A, W]) -> None:
        positions, layers = config.num_positions, load.within("encoder.layer")
        if positions is None:
            raise TypeError("MPNet has a table of positions")
        distances = load.distances(DISTANCES, config.num_heads, positions)
        super().__init__(
            config,
            load,
            ("position_embeddings", positions),
            lambda index: _layer(config, layers.within(f"{index}"), distances),
        )


def _layer(config: EncoderConfig, load: Loader[A, W], distances: W) -> PostNormLayer[W]:
    hidden, eps, own = config.hidden_size, config.norm_eps, load.within("attention.attn")
    return PostNormLayer(
        attention=SelfAttention(
            qkv=own.linear(dict.fromkeys(("q", "k", "v"), hidden), hidden, bias=True),
            output=own.linear({"o": hidden}, hidden, bias=True),
            distances=distances,
        ),
        attention_norm=load.layer_norm("attention.LayerNorm", hidden, eps, bias=True),
        mlp=load_plain_mlp(load, MLP, hidden, config.intermediate_size, bias=True),
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
