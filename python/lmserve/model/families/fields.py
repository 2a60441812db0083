"""What most families read alike from config.json and from the keys of a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from lmserve.model.activation import SILU, named_activation
from lmserve.model.config import AttentionLayer, RecurrentLayer, RopeConfig, check_sizes
from lmserve.model.errors import CheckpointError
from lmserve.model.gguf_source import GgufModel
from lmserve.model.hf_config import required
from lmserve.model.rope_config import DEFAULT_THETA, context_of, rope_of

SLIDING = "sliding_attention"
FULL = "full_attention"


def hf_fields(
    family: str,
    raw: dict[str, Any],
    *,
    eps: str = "rms_norm_eps",
    default_theta: float = DEFAULT_THETA,
    interleaved: bool = False,
    tied: bool = False,
) -> dict[str, Any]:
    """Fields of `ModelConfig`. eps: the key of the norms' epsilon; `tied`: the default of tie_word_embeddings.

    Defaults are the reference's for a config.json without the key.
    """
    hidden_size, num_heads = int(required(raw, "hidden_size")), int(required(raw, "num_attention_heads"))
    head_dim = int(raw.get("head_dim") or hidden_size // num_heads)
    context_length = context_of(raw)
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    rope = rope_of(
        raw, head_dim=head_dim, context_length=context_length, default_theta=default_theta, interleaved=interleaved
    )
    return _checked(
        {
            "architecture": family,
            "vocab_size": int(required(raw, "vocab_size")),
            "hidden_size": hidden_size,
            "intermediate_size": int(required(raw, "intermediate_size")),
            "num_layers": int(required(raw, "num_hidden_layers")),
            "num_heads": num_heads,
            "num_kv_heads": int(raw.get("num_key_value_heads") or num_heads),
            "head_dim": head_dim,
            "norm_eps": float(raw.get(eps) or 1e-6),
            "rope": rope,
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings", tied)),
            "context_length": context_length,
            "activation": named_activation(activation),
        }
    )


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    # Before anything is made for each layer.
    check_sizes(SimpleNamespace(**fields))
    return fields


def hf_windows(raw: dict[str, Any], *, period: int = 0) -> list[int | None]:
    """The window of each layer.

    Where there are no layer_types, every layer has the sliding_window but every `period`th (0: all have it).
    """
    layers, window = int(required(raw, "num_hidden_layers")), raw.get("sliding_window")
    if not window or raw.get("use_sliding_window") is False:
        return [None] * layers
    types = raw.get("layer_types")
    if types is None:
        return [int(window) if not period or (index + 1) % period else None for index in range(layers)]
    unknown = sorted(set(types) - {SLIDING, FULL})
    if unknown or len(types) != layers:
        given = f"{unknown[0]!r} is among them" if unknown else f"there are {len(types)}"
        raise CheckpointError(f"config.json: each of {layers} layer_types must be {SLIDING} or {FULL}, but {given}")
    return [int(window) if kind == SLIDING else None for kind in types]


def gguf_fields(
    family: str, file: GgufModel, *, eps: str = "layer_norm_rms_epsilon", experts: bool = False
) -> dict[str, Any]:
    """Fields of `ModelConfig`. What biases there are is read off the tensors: GGUF has no key for it.

    experts: the family has them.
    """
    if not experts and file.value("expert_count", 0):
        raise CheckpointError(f"{file.path}: models of architecture {file.architecture} with experts are not supported")
    hidden_size, num_heads = int(file.value("embedding_length")), int(file.value("attention.head_count"))
    head_dim = int(file.value("attention.key_length", hidden_size // num_heads))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    kv_heads = file.value("attention.head_count_kv", num_heads)
    if isinstance(kv_heads, list):
        # Those of layers without attention are 0.
        kv_heads = next((heads for heads in kv_heads if heads), 0)
    # Where all layers have experts there may be none; that of layers without a network is 0.
    inner = file.value("feed_forward_length", file.value("expert_feed_forward_length", 0) if experts else None)
    return _checked(
        {
            "architecture": family,
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": int(
                next((width for width in inner if width), 0) if isinstance(inner, list) else inner
            ),
            "num_layers": int(file.value("block_count")),
            "num_heads": num_heads,
            "num_kv_heads": int(kv_heads),
            "head_dim": head_dim,
            "norm_eps": float(file.value(f"attention.{eps}")),
            "rope": file.rope(head_dim),
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "context_length": int(file.value("context_length")),
            "activation": SILU,
        }
    )


def gguf_windows(file: GgufModel, *, period: int) -> list[int | None]:
    """The window of each layer: of all but every `period`th, unless the file says which have it (0: all)."""
    layers, window = int(file.value("block_count")), int(file.value("attention.sliding_window", 0))
    if not window:
        return [None] * layers
    pattern = file.value("attention.sliding_window_pattern", period)
    if isinstance(pattern, list):
        return [window if sliding else None for sliding in pattern]
    return [window if not pattern or (index + 1) % pattern else None for index in range(layers)]


def attention_layers(
    fields: dict[str, Any],
    *,
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[RopeConfig | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    temperature: tuple[float, int] | None = None,
    causal: bool = True,
) -> tuple[AttentionLayer, ...]:
    """The attention of each layer, where only windows and rotations differ between them."""
    layers = fields["num_layers"]
    return tuple(
        AttentionLayer(
            fields["num_heads"],
            fields["num_kv_heads"],
            fields["head_dim"],
            fields["head_dim"] ** -0.5 if scale is None else scale,
            rope,
            window=window,
            softcap=softcap,
            temperature=temperature,
            causal=causal,
        )
        for window, rope in zip(windows or [None] * layers, ropes or [fields["rope"]] * layers, strict=True)
    )


def hybrid_layers(
    fields: dict[str, Any],
    recurrent: Sequence[bool],
    state: RecurrentLayer,
    *,
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[RopeConfig | None] | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Fields of `ModelConfig` of layers of which some are recurrent, all with a state of this shape."""
    layers = attention_layers(fields, windows=windows, ropes=ropes, scale=scale)
    places = tuple(index for index, kind in enumerate(recurrent) if not kind)
    return {
        "attention": tuple(layers[place] for place in places),
        "attention_places": places,
        "recurrent": (state,) * sum(recurrent),
    }
