"""A head that guesses a token ahead (multi-token prediction: Gloeckle et al. 2024; DeepSeek-AI 2024).

Of the state of a token and the embedding of the next one it makes, with one layer of its own, the state from which the
token after that is guessed. Embeddings and the last linear layer are the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.layers.loading import Loader
from lmserve.model.ops import DraftOps

A = TypeVar("A")
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class MtpWeights(Generic[W]):
    """Loaded weights of such a head, but for its layer."""

    embedding_norm: W
    hidden_norm: W
    projection: W
    norm: W


def load_mtp(load: Loader[A, W], hidden: int, eps: float) -> MtpWeights[W]:
    """The weights under the names that GGUF has for them."""
    return MtpWeights(
        embedding_norm=load.rms_norm("enorm", hidden, eps),
        hidden_norm=load.rms_norm("hnorm", hidden, eps),
        projection=load.linear({"eh_proj": hidden}, 2 * hidden),
        norm=load.rms_norm("shared_head_norm", hidden, eps),
    )


def mtp_input(ops: DraftOps[A, W], states: A, embedding: W, weights: MtpWeights[W]) -> A:
    """What the head's layer is given: [T, hidden] of the states [T, hidden] and the tokens after theirs."""
    following = ops.norm(ops.embed_next(embedding), weights.embedding_norm)
    return ops.linear(ops.join(following, ops.norm(states, weights.hidden_norm)), weights.projection)
