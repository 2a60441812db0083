"""Reads what Hugging Face's config.json says of a decoder, in the forms of transformers 4 and 5."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.rope_config import DEFAULT_THETA, context_of, rope_of


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
    default_theta: float = DEFAULT_THETA,
    default_head_dim: int | None = None,
) -> ModelConfig:
    """The configuration of a decoder; the flags are what the family knows and config.json may not say.

    `default_theta` and `default_head_dim` are the reference's for a config.json without them; of the latter, None is
    hidden_size / num_attention_heads.
    """
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not supported (silu is)")
    hidden_size, num_heads = int(required(raw, "hidden_size")), int(required(raw, "num_attention_heads"))
    head_dim = int(raw.get("head_dim") or default_head_dim or hidden_size // num_heads)
    num_kv_heads = int(raw.get("num_key_value_heads") or num_heads)
    context_length = context_of(raw)
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
        rope=rope_of(raw, head_dim=head_dim, context_length=context_length, default_theta=default_theta),
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
