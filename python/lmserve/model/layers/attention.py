"""Self-attention: one linear layer for q, k and v, rotation, the cache, and the linear layer after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.config import AttentionLayer
from lmserve.model.layers.loading import Loader
from lmserve.model.ops import Ops

A = TypeVar("A")
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class SelfAttention(Generic[W]):
    """Loaded weights; the norms of q and k, where there are any, are a head wide, or as wide as all heads."""

    qkv: W
    output: W
    q_norm: W | None = None
    k_norm: W | None = None
    sinks: W | None = None
    distances: W | None = None


def load_self_attention(
    load: Loader[A, W],
    layer: AttentionLayer,
    hidden_size: int,
    *,
    bias: bool = False,
    output_bias: bool = False,
    qk_norm_eps: float | None = None,
    qk_norm_per_head: bool = True,
    sinks: bool = False,
) -> SelfAttention[W]:
    """q_proj, k_proj, v_proj and o_proj; with `qk_norm_eps` an RMS norm of each head's q and k, or one of all heads;
    with `sinks` one for each query head.
    """
    q_norm, k_norm = (layer.head_dim,) * 2 if qk_norm_per_head else (layer.q_size, layer.kv_size)
    sizes = {"q_proj": layer.q_size, "k_proj": layer.kv_size, "v_proj": layer.kv_size}
    return SelfAttention(
        qkv=load.linear(sizes, hidden_size, bias=bias),
        output=load.linear({"o_proj": hidden_size}, layer.q_size, bias=output_bias),
        q_norm=None if qk_norm_eps is None else load.rms_norm("q_norm", q_norm, qk_norm_eps),
        k_norm=None if qk_norm_eps is None else load.rms_norm("k_norm", k_norm, qk_norm_eps),
        sinks=load.sinks("sinks", layer.num_heads) if sinks else None,
    )


def attend(ops: Ops[A, W], normed: A, layer: int, weights: SelfAttention[W]) -> A:
    """What the heads of a layer see, [T, heads * head_dim], before the output's linear layer."""
    query = ops.rope_and_cache(ops.linear(normed, weights.qkv), layer, weights.q_norm, weights.k_norm)
    return ops.attention(query, layer, weights.sinks, weights.distances)
