"""Latent attention (DeepSeek-V2's MLA): the cache has one latent for all heads of a token, and a rotated end.

What makes keys of latents is absorbed into the queries, and what makes values of them into the output: a head's query
is brought to the latents' width, and the mean of latents that it sees to the values' width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.layers.loading import Loader
from lmserve.model.ops import Ops

A = TypeVar("A")
W = TypeVar("W")

# Of the norms of latents, whatever config.json says of the others.
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class LatentSizes:
    """Widths of a head: `nope` elements that are not rotated and `rope` that are, and its value; `rank` of a latent.

    `query_rank`: of the queries' own latent; None: they have none.
    """

    heads: int
    rank: int
    nope: int
    rope: int
    value: int
    query_rank: int | None


@dataclass(frozen=True, slots=True)
class LatentAttention(Generic[W]):
    """Loaded weights; `query_latent` and its norm where queries have a latent of their own."""

    query_latent: tuple[W, W] | None
    query: W
    latent: W
    latent_norm: W
    keys: W
    values: W
    output: W
    rope: int


def load_latent_attention(
    load: Loader[A, W], sizes: LatentSizes, hidden_size: int, *, bias: bool = False
) -> LatentAttention[W]:
    """The tensors of DeepSeek-V2, with kv_b_proj taken apart into k_b_proj [heads, rank, nope] and v_b_proj."""
    heads, rank = sizes.heads, sizes.rank
    wide = heads * (sizes.nope + sizes.rope)
    query_latent = None
    if sizes.query_rank is not None:
        query_latent = (
            load.linear({"q_a_proj": sizes.query_rank}, hidden_size, bias=bias),
            load.rms_norm("q_a_layernorm", sizes.query_rank, EPS),
        )
        query = load.linear({"q_b_proj": wide}, sizes.query_rank)
    else:
        query = load.linear({"q_proj": wide}, hidden_size)
    return LatentAttention(
        query_latent=query_latent,
        query=query,
        latent=load.linear({"kv_a_proj_with_mqa": rank + sizes.rope}, hidden_size, bias=bias),
        latent_norm=load.rms_norm("kv_a_layernorm", rank, EPS),
        keys=load.heads("k_b_proj", heads, rank, sizes.nope),
        values=load.heads("v_b_proj", heads, sizes.value, rank),
        output=load.linear({"o_proj": hidden_size}, heads * sizes.value, bias=bias),
        rope=sizes.rope,
    )


def attend_latent(ops: Ops[A, W], normed: A, layer: int, weights: LatentAttention[W]) -> A:
    """What the heads of a layer see, [T, heads * value], before the output's linear layer."""
    latent = ops.linear(normed, weights.latent)
    if weights.query_latent is not None:
        down, norm = weights.query_latent
        normed = ops.norm(ops.linear(normed, down), norm)
    query = ops.heads(ops.linear(normed, weights.query), weights.keys, weights.rope)
    query = ops.latent_and_cache(query, latent, layer, weights.latent_norm)
    return ops.heads(ops.attention(query, layer), weights.values)
