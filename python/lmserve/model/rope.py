"""Rotary position embedding in numpy: the tables that every `Ops` implementation rotates by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmserve.model.config import AttentionLayer, RopeConfig

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def has_long_factors(rope: RopeConfig, length: int) -> bool:
    """Whether a server whose sequences may have `length` positions divides all of them by longrope's long factors.

    The choice is the server's and not a sequence's: keys of one token and position are equal in all sequences, which
    share them through the prefix cache.
    """
    return rope.kind == "longrope" and length > rope.original_context_length


def original_length(layers: Sequence[AttentionLayer], length: int) -> int:
    """The original context length of a model whose layers have long factors at this `length`; 0: none has."""
    ropes = [layer.rope for layer in layers if layer.rope is not None and has_long_factors(layer.rope, length)]
    return max((rope.original_context_length for rope in ropes), default=0)


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int = 0) -> F64:
    """[head_dim / 2] angle per position of each rotated pair, after scaling; 0 for pairs that are not rotated.

    `length`: positions that a sequence may have, which some kinds depend on.
    """
    rotated = rope.rotary_dim or head_dim
    whole = head_dim if rope.kind == "proportional" else rotated
    plain = rope.theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / whole)
    factors = rope.frequency_factors
    if has_long_factors(rope, length):
        factors = rope.long_factors
    if factors:
        plain = plain / np.asarray(factors, np.float64)
    match rope.kind:
        case "none":
            scaled = plain
        case "linear" | "longrope" | "proportional":
            scaled = plain / rope.factor
        case "llama3":
            scaled = _llama3(rope, plain)
        case "yarn":
            scaled = _yarn(rope, plain, rotated)
        case _:
            kinds = "none, linear, llama3, yarn, longrope, proportional"
            raise ValueError(f"rope scaling kind {rope.kind!r} is not one of {kinds}")
    return np.concatenate((scaled, np.zeros(head_dim // 2 - len(scaled))))


def rope_tables(rope: RopeConfig, head_dim: int, length: int) -> tuple[F32, F32]:
    """cos and sin, each [length, head_dim / 2], of positions 0 .. length, the attention factor multiplied in.

    The pairs are those of a head whose elements have the order of `head_order`.
    """
    frequencies = inverse_frequencies(rope, head_dim, length)
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies[None, :]
    # What is not rotated is not scaled either.
    scale = np.where(frequencies == 0, 1.0, rope.attention_factor)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def head_order(rope: RopeConfig, head_dim: int) -> NDArray[np.int64] | None:
    """Where each element of a head stands in the checkpoint, so that all pairs are half a head apart; None: there.

    Attention is a product of queries and keys, so one order for both changes nothing but which elements are rotated
    together.
    """
    rotated = head_dim if rope.kind == "proportional" else rope.rotary_dim or head_dim
    pairs = np.arange(rotated).reshape((-1, 2) if rope.interleaved else (2, -1))
    first, second = pairs.T if rope.interleaved else pairs
    rest = np.arange(rotated, head_dim)
    middle = len(rest) // 2
    order = np.concatenate((first, rest[:middle], second, rest[middle:])).astype(np.int64)
    return None if (order == np.arange(head_dim)).all() else order


@dataclass(frozen=True, slots=True)
class PositionTables:
    """What depends on a token's position: distinct tables, and for each layer which of them it takes, if any."""

    ropes: list[tuple[F32, F32]]  # cos and sin, [length, head_dim / 2] each
    query_scales: list[F32]  # [length]
    places: list[tuple[int | None, int | None]]


def position_tables(layers: Sequence[AttentionLayer], length: int) -> PositionTables:
    """The tables of positions 0 .. length."""
    ropes: dict[tuple[RopeConfig, int], int] = {}
    temperatures: dict[tuple[float, int, int], int] = {}
    places = []
    for layer in layers:
        rope = layer.rope
        temperature = None if layer.temperature is None else (*layer.temperature, layer.temperature_offset)
        places.append(
            (
                None if rope is None else ropes.setdefault((rope, layer.rotary_width), len(ropes)),
                None if temperature is None else temperatures.setdefault(temperature, len(temperatures)),
            )
        )
    positions = np.arange(length)
    scales = [(1 + beta * np.log1p((positions + offset) // n)).astype(np.float32) for beta, n, offset in temperatures]
    return PositionTables([rope_tables(rope, head_dim, length) for rope, head_dim in ropes], scales, places)


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
    ramp = (np.arange(head_dim // 2, dtype=np.float64) - low) / ((high - low) or 0.001)
    extrapolated = 1 - np.clip(ramp, 0.0, 1.0)
    return plain / rope.factor * (1 - extrapolated) + plain * extrapolated
