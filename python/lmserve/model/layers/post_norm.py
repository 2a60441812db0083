"""The encoder of BERT and its like: each half of a layer is added to its input, and the sum is normed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.config import EncoderConfig
from lmserve.model.layers.attention import SelfAttention, attend
from lmserve.model.layers.encoder import Encoder
from lmserve.model.layers.experts import Experts, mixture
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, PlainMlp, network

A = TypeVar("A")
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class PostNormLayer(Generic[W]):
    """Loaded weights of one layer."""

    attention: SelfAttention[W]
    attention_norm: W
    mlp: GatedMlp[W] | PlainMlp[W] | Experts[W]
    norm: W


class PostNormEncoder(Encoder[A, W]):
    """Attention and a feed-forward network; each is added to what it was given, and the sum is normalised."""

    def __init__(
        self,
        config: EncoderConfig,
        load: Loader[A, W],
        places: tuple[str, int] | None,
        layer: Callable[[int], PostNormLayer[W]],
    ) -> None:
        """Load the whole model. `places`: name and rows of the table that is added to the embeddings of words."""
        hidden = config.hidden_size
        self.ops, self.config = load.ops, config
        self.words = load.embedding("embeddings.word_embeddings", config.vocab_size, hidden, head=False)
        self.places: W | None = None
        if places is not None:
            name, rows = places
            self.places = load.embedding(f"embeddings.{name}", rows, hidden, head=False)
        self.norm = load.layer_norm("embeddings.LayerNorm", hidden, config.norm_eps, bias=True)
        self.layers = [layer(index) for index in range(config.num_layers)]

    def states(self) -> A:
        ops = self.ops
        words = ops.embed(self.words)
        if self.places is None:
            states = ops.norm(words, self.norm)
        else:
            states, _ = ops.add_norm(ops.embed_places(self.places), words, self.norm)
        for index, layer in enumerate(self.layers):
            attended = ops.linear(attend(ops, states, index, layer.attention), layer.attention.output)
            states, _ = ops.add_norm(attended, states, layer.attention_norm)
            if isinstance(layer.mlp, Experts):
                inner = mixture(ops, states, layer.mlp)
            else:
                inner = network(ops, states, layer.mlp, self.config.activation)
            states, _ = ops.add_norm(inner, states, layer.norm)
        return states
