"""Rotary position embedding in numpy: the tables that every `Ops` implementation rotates by."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lmserve.model.config import RopeConfig

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> F64:
    """[head_dim / 2] angle per position of each rotated pair, after scaling."""
    plain = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match rope.kind:
        case "none":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, plain, head_dim)
        case "factors":
            return plain / np.asarray(rope.frequency_factors, np.float64)
    raise ValueError(f"rope scaling kind {rope.kind!r} is not one of none, linear, llama3, yarn, factors")


def rope_tables(rope: RopeConfig, head_dim: int, length: int) -> tuple[F32, F32]:
    """cos and sin, each [length, head_dim / 2], of positions 0 .. length; yarn's attention factor is multiplied in."""
    angles = np.arange(length, dtype=np.float64)[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    scale = rope.attention_factor
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def _llama3(rope: RopeConfig, plain: F64) -> F64:
    turns = rope.original_context_length * plain / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * plain / rope.factor + smooth * plain


def _yarn(rope: RopeConfig, plain: F64, head_dim: int) -> F64:
    def dimension_of(turns: float) -> float:
        return head_dim * math.log(rope.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float64) - low) / max(high - low, 0.001)
    extrapolated = 1 - np.clip(ramp, 0.0, 1.0)
    return plain / rope.factor * (1 - extrapolated) + plain * extrapolated
