"""The decoder that most families share: the input of a layer's two halves is normalized, and their output is added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.activation import Activation
from lmserve.model.config import ModelConfig
from lmserve.model.layers.attention import SelfAttention, attend
from lmserve.model.layers.experts import Experts, mixture
from lmserve.model.layers.latent_attention import LatentAttention, attend_latent
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, PlainMlp, network
from lmserve.model.ops import Ops

A = TypeVar("A")
W = TypeVar("W")
C = TypeVar("C", bound=ModelConfig)


@dataclass(frozen=True, slots=True)
class PreNormLayer(Generic[W]):
    """Loaded weights of one layer; `activation` is the feed-forward network's, if not the configuration's."""

    input_norm: W
    attention: SelfAttention[W] | LatentAttention[W]
    mlp_norm: W
    mlp: GatedMlp[W] | PlainMlp[W] | Experts[W]
    activation: Activation | None = None


class PreNormDecoder(Generic[A, W]):
    """Attention, then experts or one feed-forward network; each reads normed states and is added to the states."""

    def __init__(
        self,
        config: C,
        load: Loader[A, W],
        layer: Callable[[C, int, Loader[A, W]], PreNormLayer[W]],
        *,
        norm: W | None = None,
        embedding_scale: float = 1.0,
        residual_scale: float = 1.0,
    ) -> None:
        """Load the whole model.

        `norm` is the last norm, where it is no RMS norm. The embeddings are multiplied by `embedding_scale`, and what
        each half of a layer gives by `residual_scale`.
        """
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops = load.ops
        self.embedding_scale, self.residual_scale = embedding_scale, residual_scale
        self.config: ModelConfig = config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)]
        self.norm = load.rms_norm("model.norm", hidden, config.norm_eps) if norm is None else norm
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops, scale = self.ops, self.residual_scale
        states = ops.embed(self.embedding, self.embedding_scale)
        normed = ops.norm(states, self.layers[0].input_norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            attended = attend_layer(ops, normed, index, layer.attention)
            if last and sampled_rows_only:
                attended, states = ops.rows(attended), ops.rows(states)
            attended = ops.linear(attended, layer.attention.output)
            normed, states = ops.add_norm(attended, states, layer.mlp_norm, scale=scale)
            following = self.norm if last else self.layers[index + 1].input_norm
            inner = feed_forward(ops, normed, layer.mlp, layer.activation or self.config.activation)
            normed, states = ops.add_norm(inner, states, following, scale=scale)
        return normed


def attend_layer(ops: Ops[A, W], normed: A, layer: int, weights: SelfAttention[W] | LatentAttention[W]) -> A:
    """What the heads of a layer see, before the output's linear layer."""
    if isinstance(weights, LatentAttention):
        return attend_latent(ops, normed, layer, weights)
    return attend(ops, normed, layer, weights)


def feed_forward(ops: Ops[A, W], x: A, weights: GatedMlp[W] | PlainMlp[W] | Experts[W], activation: Activation) -> A:
    """What a layer's experts, or its one feed-forward network, make of x."""
    if isinstance(weights, Experts):
        return mixture(ops, x, weights)
    return network(ops, x, weights, activation)
