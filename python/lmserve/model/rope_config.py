"""Reads the rotary embedding of a checkpoint: `rope_parameters` or `rope_scaling` of config.json, `rope.*` of GGUF.

References: transformers' modeling_rope_utils.py; llama.cpp's llama-model.cpp and llama-context.cpp. A key that changes
numbers there and is not known here is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lmserve.model.config import RopeConfig
from lmserve.model.errors import CheckpointError

DEFAULT_THETA: Final = 10000.0
KINDS: Final = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
_ALIASES: Final = {"su": "longrope", "mrope": "default"}
# Positions of text are the same along the three axes of mRoPE, so its sections change nothing. What Ministral's
# attention reads beside the rotation (llama_4_scaling_beta) is the family's to read.
_KNOWN: Final = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "low_freq_factor",
        "high_freq_factor",
        "short_factor",
        "long_factor",
        "mrope_section",
        "mrope_interleaved",
        "max_position_embeddings",
        "llama_4_scaling_beta",
        "finetuned",
    }
)
_GGUF_KINDS: Final = ("none", "linear", "yarn", "longrope")


def rope_of(
    raw: Mapping[str, Any],
    *,
    head_dim: int,
    context_length: int,
    layer_type: str | None = None,
    default_theta: float = DEFAULT_THETA,
    interleaved: bool = False,
) -> RopeConfig:
    """The rotation that `raw`, a config.json, describes.

    `layer_type` picks one of several (such as "sliding_attention"), where config.json has them by type of layer.
    `interleaved`: the family rotates adjacent pairs. Raises CheckpointError for an unknown key and for a value that is
    not a number.
    """
    scaling = _parameters(raw, layer_type)
    unknown = sorted(scaling.keys() - _KNOWN)
    if unknown:
        raise CheckpointError(f"config.json: {unknown[0]} of rope_parameters is not supported")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    kind = _ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise CheckpointError(f"config.json: rope scaling {kind!r} is not supported ({', '.join(KINDS)} are)")
    theta = _positive("rope_theta", scaling.get("rope_theta") or raw.get("rope_theta") or default_theta)
    share = _positive(
        "partial_rotary_factor", _first(scaling.get("partial_rotary_factor"), raw.get("partial_rotary_factor"), 1.0)
    )
    rotary_dim = _rotary_dim(head_dim, share)
    longest = int(raw.get("max_position_embeddings") or context_length)
    # As the reference has it: a value beside rope_parameters comes first.
    original = _first(
        raw.get("original_max_position_embeddings"), scaling.get("original_max_position_embeddings"), longest
    )
    original = int(_positive("original_max_position_embeddings", original))
    factor = scaling.get("factor")
    if kind in ("linear", "dynamic", "llama3") and factor is None:
        raise CheckpointError(f"config.json has no factor of rope scaling {kind}")
    factor = _positive("factor", longest / original if factor is None and kind in ("yarn", "longrope") else factor or 1)
    common: dict[str, Any] = {"theta": theta, "rotary_dim": rotary_dim, "interleaved": interleaved}
    match kind:
        case "linear":
            return RopeConfig(**common, kind="linear", factor=factor)
        case "proportional":
            rotated = 2 * int(share * head_dim // 2)
            return RopeConfig(
                theta=theta, kind="proportional", factor=factor, rotary_dim=rotated, interleaved=interleaved
            )
        case "llama3":
            return RopeConfig(
                **common,
                kind="llama3",
                factor=factor,
                original_context_length=original,
                low_freq_factor=_positive("low_freq_factor", _required(scaling, "low_freq_factor")),
                high_freq_factor=_positive("high_freq_factor", _required(scaling, "high_freq_factor")),
            )
        case "yarn":
            return RopeConfig(
                **common,
                kind="yarn",
                factor=factor,
                original_context_length=original,
                beta_fast=_positive("beta_fast", scaling.get("beta_fast") or 32.0),
                beta_slow=_positive("beta_slow", scaling.get("beta_slow") or 1.0),
                attention_factor=_yarn_attention(scaling, factor),
                truncate=bool(scaling.get("truncate", True)),
            )
        case "longrope":
            attention = scaling.get("attention_factor")
            if attention is None:
                attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            pairs = (rotary_dim or head_dim) // 2
            return RopeConfig(
                **common,
                kind="longrope",
                original_context_length=original,
                frequency_factors=_factors("short_factor", _required(scaling, "short_factor"), pairs),
                long_factors=_factors("long_factor", _required(scaling, "long_factor"), pairs),
                attention_factor=_positive("attention_factor", attention),
            )
        case _:
            # Dynamic NTK departs from plain rotation only beyond max_position_embeddings, which is never passed here.
            return RopeConfig(**common)


def context_of(raw: Mapping[str, Any]) -> int:
    """Longest sequence that config.json, `raw`, says its model is made for: yarn's factor times what it began with."""
    longest = int(_required(raw, "max_position_embeddings"))
    scaling = _parameters(raw, "full_attention")
    kind = scaling.get("rope_type") or scaling.get("type")
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if kind != "yarn" or not original or not factor:
        return longest
    return max(longest, int(_positive("factor", factor) * _positive("original_max_position_embeddings", original)))


def gguf_rope(
    metadata: Mapping[str, Any],
    prefix: str,
    *,
    head_dim: int,
    context_length: int,
    factors: Mapping[str, Sequence[float]],
    interleaved: bool = False,
    theta_key: str = "freq_base",
    dimension_key: str = "dimension_count",
) -> RopeConfig:
    """The rotation that a GGUF file's metadata under `prefix` describe.

    `factors`: the values of its tensors "rope_freqs", "rope_factors_short" and "rope_factors_long", where it has them.
    Raises CheckpointError for an unknown key and for a value that is not a number.
    """

    def value(key: str, default: Any) -> Any:
        found = metadata.get(f"{prefix}.rope.{key}")
        return default if found is None else found

    kind = value("scaling.type", "linear")
    if kind not in _GGUF_KINDS:
        raise CheckpointError(f"rope scaling {kind!r} is not supported ({', '.join(_GGUF_KINDS)} are)")
    if value("scaling.alpha", 0.0):
        raise CheckpointError(f"the key {prefix}.rope.scaling.alpha is not supported")
    # 0 is one way to write "none"; scale_linear is the older name.
    factor = value("scaling.factor", None)
    factor = _positive("rope.scaling.factor", (value("scale_linear", 0.0) if factor is None else factor) or 1.0)
    original = int(value("scaling.original_context_length", 0) or context_length)
    rotary_dim = int(value(dimension_key, head_dim))
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise CheckpointError(f"{prefix}.rope.{dimension_key} must be even and in [2, {head_dim}], but is {rotary_dim}")
    short = factors.get("rope_freqs", factors.get("rope_factors_short", ()))
    attention = _positive("rope.scaling.attn_factor", value("scaling.attn_factor", 1.0))
    common: dict[str, Any] = {
        "theta": _positive(f"rope.{theta_key}", value(theta_key, DEFAULT_THETA)),
        "rotary_dim": 0 if rotary_dim == head_dim else rotary_dim,
        "interleaved": interleaved,
        "frequency_factors": _factors("rope_freqs", short, rotary_dim // 2) if len(short) else (),
    }
    extrapolation = float(value("scaling.yarn_ext_factor", -1.0))
    if kind == "yarn" and extrapolation != 0:
        if extrapolation not in (-1.0, 1.0):
            given = f"{prefix}.rope.scaling.yarn_ext_factor"
            raise CheckpointError(f"{given} must be 0 or 1, but {extrapolation:g} was given")
        multiplier = float(value("scaling.yarn_log_multiplier", 0.0))
        return RopeConfig(
            **common,
            kind="yarn",
            factor=factor,
            original_context_length=original,
            beta_fast=_positive("yarn_beta_fast", value("scaling.yarn_beta_fast", 32.0)),
            beta_slow=_positive("yarn_beta_slow", value("scaling.yarn_beta_slow", 1.0)),
            attention_factor=attention * _mscale(factor, 1.0) / (_mscale(factor, multiplier) if multiplier else 1.0),
        )
    if kind == "yarn":
        attention *= float(value("scaling.yarn_attn_factor", 1.0))
    if "rope_factors_long" in factors and "rope_freqs" not in factors:
        long = _factors("rope_factors_long", factors["rope_factors_long"], rotary_dim // 2)
        common |= {"kind": "longrope", "long_factors": long, "original_context_length": original}
    elif kind != "none" and factor != 1:
        common |= {"kind": "linear"}
    return RopeConfig(**common, factor=1.0 if kind == "none" else factor, attention_factor=attention)


def _parameters(raw: Mapping[str, Any], layer_type: str | None) -> dict[str, Any]:
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: rope_parameters must be an object, but {given!r} was given")
    by_type = {key: value for key, value in given.items() if isinstance(value, Mapping)}
    if by_type:
        chosen = by_type.get(layer_type or "full_attention")
        if chosen is None:
            raise CheckpointError(f"config.json: rope_parameters has no {layer_type or 'full_attention'}")
        return dict(chosen)
    return dict(given)


def _rotary_dim(head_dim: int, share: float) -> int:
    rotary_dim = int(head_dim * share)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise CheckpointError(
            f"config.json: partial_rotary_factor {share:g} of head_dim {head_dim} must rotate an even number of"
            f" elements in [2, {head_dim}], but makes {rotary_dim}"
        )
    return 0 if rotary_dim == head_dim else rotary_dim


def _yarn_attention(scaling: Mapping[str, Any], factor: float) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return _positive("attention_factor", given)
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _mscale(factor, float(mscale)) / _mscale(factor, float(mscale_all_dim))
    return _mscale(factor, 1.0)


def _mscale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _factors(name: str, given: Any, pairs: int) -> tuple[float, ...]:
    factors = tuple(_positive(name, factor) for factor in given)
    if len(factors) != pairs:
        raise CheckpointError(f"{name} has one entry for each of {pairs} rotated pairs, but {len(factors)} were given")
    return factors


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _required(given: Mapping[str, Any], key: str) -> Any:
    value = given.get(key)
    if value is None:
        raise CheckpointError(f"config.json has no {key}")
    return value


def _positive(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not (math.isfinite(given) and given > 0):
        raise CheckpointError(f"{name} of the rotary embedding must be a positive number, but {given!r} was given")
    return float(given)
