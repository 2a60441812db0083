"""Reads what Hugging Face's config.json says of a decoder, in the forms of transformers 4 and 5."""

from __future__ import annotations

import math
from typing import Any

from lmserve.model.config import ModelConfig, RopeConfig
from lmserve.model.errors import CheckpointError


def required(raw: dict[str, Any], key: str) -> Any:
    """The value of a key that config.json must have."""
    value = raw.get(key)
    if value is None:
        raise CheckpointError(f"config.json has no {key}")
    return value


def decoder_config(
    family: str,
    raw: dict[str, Any],
    *,
    attention_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """The configuration of a decoder; the flags are what the family knows and config.json may not say."""
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not supported (silu is)")
    hidden_size, num_heads = int(required(raw, "hidden_size")), int(required(raw, "num_attention_heads"))
    head_dim = int(raw.get("head_dim") or hidden_size // num_heads)
    num_kv_heads = int(raw.get("num_key_value_heads") or num_heads)
    context_length = int(required(raw, "max_position_embeddings"))
    return ModelConfig(
        architecture=family,
        vocab_size=int(required(raw, "vocab_size")),
        hidden_size=hidden_size,
        intermediate_size=int(required(raw, "intermediate_size")),
        num_layers=int(required(raw, "num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw, context_length),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        # Within the window, sliding attention is full attention: a shorter context keeps the model exact.
        context_length=min(context_length, _window(raw) or context_length),
        attention_bias=attention_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def _window(raw: dict[str, Any]) -> int | None:
    """Tokens that the layer with the shortest view sees, None where every layer sees all."""
    window = raw.get("sliding_window")
    if not window or raw.get("use_sliding_window") is False:
        return None
    kinds = raw.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return int(window)


def _rope(raw: dict[str, Any], context_length: int) -> RopeConfig:
    scaling: dict[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError("config.json: rotating a part of each head (partial_rotary_factor) is not supported")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    factor = float(scaling.get("factor") or 1.0)
    original = int(scaling.get("original_max_position_embeddings") or context_length)
    # Dynamic NTK departs from plain rotation only beyond max_position_embeddings, which is never passed here.
    if kind in ("default", "dynamic"):
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=factor,
            original_context_length=original,
            low_freq_factor=float(required(scaling, "low_freq_factor")),
            high_freq_factor=float(required(scaling, "high_freq_factor")),
        )
    if kind == "yarn":
        default_attention = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_context_length=original,
            beta_fast=float(scaling.get("beta_fast") or 32.0),
            beta_slow=float(scaling.get("beta_slow") or 1.0),
            attention_factor=float(scaling.get("attention_factor") or default_attention),
            truncate=bool(scaling.get("truncate", True)),
        )
    raise CheckpointError(
        f"config.json: rope scaling {kind!r} is not supported (default, linear, dynamic, llama3, yarn are)"
    )
