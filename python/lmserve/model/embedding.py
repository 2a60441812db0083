"""From the states of a text's tokens to its embedding, or to the scores that a model gives it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lmserve.model.tensors import TensorSource

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

# Which states make a text's vector: their mean, the first token's, the last token's, or their mean with weights 1, 2, 3
# and so on (SGPT).
POOLINGS: Final = ("mean", "cls", "last", "weighted")

# Names of prompts for what other servers' clients call the type of their input.
INPUT_TYPES: Final[dict[str, tuple[str, ...]]] = {
    "query": ("query", "search_query", "retrieval.query", "web_search_query", "s2p_query"),
    "document": ("document", "passage", "search_document", "retrieval.passage", "corpus"),
    "search_query": ("search_query", "query", "retrieval.query", "web_search_query", "s2p_query"),
    "search_document": ("search_document", "document", "passage", "retrieval.passage", "corpus"),
    "passage": ("passage", "document", "search_document", "retrieval.passage", "corpus"),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
}


@dataclass(frozen=True, slots=True)
class VectorNorm:
    """A layer norm of a vector, with a weight and a bias [width]."""

    weight: TensorSource
    bias: TensorSource | None
    eps: float


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A layer over a pooled vector: activation(weight [out, in] times it, plus bias [out]), and a norm of that."""

    weight: TensorSource
    bias: TensorSource | None = None
    activation: str = "identity"  # or "tanh", "relu", "sigmoid", "gelu"
    norm: VectorNorm | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """The words around a query and a document, for a model that answers whether they go together."""

    before: str
    between: str  # ends where the space before the document begins
    after: str

    def around(self, query: str, document: str) -> tuple[str, str, str]:
        """What comes before the document, the document with the space before it, and what comes after."""
        return f"{self.before}{query}{self.between}", f" {document}", self.after


@dataclass(frozen=True, slots=True)
class Embedding:
    """What a model does with the final states of a text.

    `pooling`: one of POOLINGS; None: the model says that its states are not pooled, and embeds nothing.
    `scores`: the vector is not an embedding but the model's scores of a pair of texts, and is not normalised; "sigmoid"
    or "identity" is then what a score of one label is shown through.
    `several_labels`: more than one of `labels` may hold of a text.
    `dimensions`: lengths that an embedding may be cut to, as its training allows (Matryoshka): () none, (0,) any.
    `centered`: a vector that is cut loses the mean of its numbers before, as by a layer norm without weights.
    `segments`: the token that ends the first of a pair's two segments (-1: none does), and how many positions a segment
    has in the table of what the encoder adds to words; 0: one, whatever the position.
    `frame`: the words that a pair of texts is put into.
    """

    pooling: str | None = "mean"
    layers: tuple[DenseLayer, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    dimensions: tuple[int, ...] = ()
    centered: bool = False
    scores: str | None = None
    labels: tuple[str, ...] = ()
    several_labels: bool = False
    segments: tuple[int, int] | None = None
    frame: Frame | None = None
    length: int = 0  # numbers of a vector, once the model's width is known

    def of_width(self, hidden_size: int) -> Embedding:
        """The same with its `length`, for states of this width."""
        return replace(self, length=self.layers[-1].weight.shape[0] if self.layers else hidden_size)

    def allows(self, length: int) -> bool:
        """Whether vectors may be cut to this length."""
        return length == self.length or length in self.dimensions or (self.dimensions == (0,) and length < self.length)

    def places(self, token_ids: I32) -> I32:
        """For each token of a text its row among the embeddings of positions, those of the second segment last."""
        places = np.arange(len(token_ids), dtype=np.int32)
        if self.segments is None:
            return places
        separator, positions = self.segments
        if positions == 0:
            places[:] = 0
        ends = np.flatnonzero(token_ids == separator)
        if len(ends):
            places[ends[0] + 1 :] += positions or 1
        return places

    def prompt_of(self, input_type: str) -> str:
        """The text before an input of this type; nothing where the model has no prompt for it."""
        for name in INPUT_TYPES.get(input_type, (input_type,)):
            if name in self.prompts:
                return self.prompts[name]
        return ""

    @property
    def default_prefix(self) -> str:
        """The text before an input of which nothing is said."""
        return "" if self.default_prompt is None else self.prompts[self.default_prompt]


MEAN: Final = Embedding()

# Nomic's models, whose files do not say that their vectors may be cut; v1.5's pass a layer norm before.
_NOMIC: Final[dict[str, tuple[tuple[int, ...], bool]]] = {
    "nomic-embed-text-v1.5": ((64, 128, 256, 512), True),
    "nomic-embed-text-v2-moe": ((256,), False),
}


def named(embedding: Embedding, family: str, name: str) -> Embedding:
    """The same with what is known of a model by its name alone."""
    if not family.startswith("nomic_bert") or embedding.scores is not None:
        return embedding
    for known, (dimensions, centered) in _NOMIC.items():
        if known in name.lower():
            return replace(embedding, dimensions=embedding.dimensions or dimensions, centered=centered)
    return embedding


class EmbeddingHead:
    """The layers after pooling, loaded. Each vector is computed by itself, so that it is the same beside others."""

    def __init__(self, embedding: Embedding) -> None:
        self._layers = [_Loaded(layer) for layer in embedding.layers]
        self._normalised = embedding.scores is None

    def __call__(self, pooled: F32) -> F32:
        """[n, size] of pooled vectors [n, hidden]: L2-normalised embeddings, or scores."""
        finished: F32 = np.stack([self._one(vector) for vector in pooled]) if self._layers else pooled
        if not self._normalised:
            return finished
        with np.errstate(invalid="ignore", over="ignore"):
            lengths = np.sqrt(np.square(finished.astype(np.float64)).sum(-1, keepdims=True))
            normalised: F32 = (finished / np.maximum(lengths, 1e-12)).astype(np.float32)
        return normalised

    def _one(self, vector: F32) -> F32:
        for layer in self._layers:
            vector = layer(vector)
        return vector


class _Loaded:
    def __init__(self, layer: DenseLayer) -> None:
        self._weight = _floats(layer.weight)
        self._bias = None if layer.bias is None else _floats(layer.bias)
        self._activation = layer.activation
        self._norm = layer.norm
        self._scale = None if layer.norm is None else _floats(layer.norm.weight)
        self._shift = None if layer.norm is None or layer.norm.bias is None else _floats(layer.norm.bias)

    def __call__(self, vector: F32) -> F32:
        vector = self._weight @ vector
        if self._bias is not None:
            vector = vector + self._bias
        match self._activation:
            case "tanh":
                vector = np.tanh(vector)
            case "relu":
                vector = np.maximum(vector, np.float32(0))
            case "sigmoid":
                vector = np.float32(1) / (np.float32(1) + np.exp(-vector))
            case "gelu":
                halves = np.array([1 + math.erf(x / math.sqrt(2)) for x in vector.tolist()], np.float32)
                vector = vector * halves / np.float32(2)
        if self._norm is not None and self._scale is not None:
            wide = vector.astype(np.float64)
            wide = (wide - wide.mean()) / np.sqrt(wide.var() + self._norm.eps)
            vector = wide.astype(np.float32) * self._scale
            if self._shift is not None:
                vector = vector + self._shift
        return vector


def _floats(source: TensorSource) -> F32:
    return np.ascontiguousarray(source.dequantize(), np.float32)
