"""Gemma 3 (text): Gemma 2 with norms of q and k in place of the soft-cap, and five layers with a window to one
without; EmbeddingGemma, whose tokens see those after them too.
"""

from __future__ import annotations

from typing import Any

from lmserve.model.activation import GELU_TANH
from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family
from lmserve.model.families.fields import (
    FULL,
    SLIDING,
    attention_layers,
    gguf_fields,
    gguf_windows,
    hf_fields,
    hf_windows,
)
from lmserve.model.families.gemma2 import GGUF_NAMES, Gemma2, shifted_norms
from lmserve.model.gguf_source import GgufModel
from lmserve.model.rope_config import rope_of

DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
PERIOD = 6
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
# The layers of the 27B model, whose queries are scaled by hidden_size / num_heads.
LARGE = 62


def hf_config(raw: dict[str, Any]) -> ModelConfig:
    raw = DEFAULTS | raw
    fields = hf_fields("gemma3", raw, tied=True, default_theta=GLOBAL_THETA)
    windows = hf_windows(raw, period=int(raw.get("sliding_window_pattern") or PERIOD))
    causal = raw.get("use_bidirectional_attention") is not True
    if not causal:
        windows = [both_sides(window) for window in windows]
    if isinstance((raw.get("rope_parameters") or {}).get(FULL), dict):
        local = raw
    else:
        # Before transformers 5: scaling is of the layers without a window alone.
        local = raw | {
            "rope_parameters": None,
            "rope_scaling": None,
            "rope_theta": raw.get("rope_local_base_freq") or LOCAL_THETA,
        }
    sliding = rope_of(
        local,
        head_dim=fields["head_dim"],
        context_length=fields["context_length"],
        layer_type=SLIDING,
        default_theta=LOCAL_THETA,
    )
    return ModelConfig(
        **fields,
        qk_norm=True,
        attention=attention_layers(
            fields,
            windows=windows,
            ropes=[fields["rope"] if window is None else sliding for window in windows],
            scale=float(raw["query_pre_attn_scalar"]) ** -0.5,
            softcap=raw["attn_logit_softcapping"],
            causal=causal,
        ),
        logits_softcap=raw["final_logit_softcapping"],
    )


def both_sides(window: int | None) -> int | None:
    """The window of a layer that is not causal, of which the files say how many tokens are seen in all."""
    return None if window is None else window // 2 + 1


def gguf_config(file: GgufModel, *, causal: bool = True) -> ModelConfig:
    """Of Gemma 3 and, not causal, of EmbeddingGemma."""
    fields = gguf_fields("gemma3", file) | {"activation": GELU_TANH}
    width = fields["hidden_size"] // fields["num_heads"] if fields["num_layers"] == LARGE else fields["head_dim"]
    windows = gguf_windows(file, period=PERIOD)
    if not causal:
        windows = [both_sides(window) for window in windows]
    sliding = file.plain_rope("freq_base_swa", LOCAL_THETA)
    return ModelConfig(
        **fields,
        qk_norm=True,
        attention=attention_layers(
            fields,
            windows=windows,
            ropes=[fields["rope"] if window is None else sliding for window in windows],
            scale=width**-0.5,
            causal=causal,
        ),
        logits_softcap=file.value("final_logit_softcapping", 0.0) or None,
    )


FAMILY = Family(
    name="gemma3",
    kind="generate",
    hf_architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    hf_config=hf_config,
    hf_tensors=shifted_norms,
    decoder=Gemma2,
    limits="images",
    gguf_architecture="gemma3",
    gguf_config=gguf_config,
    gguf_names=GGUF_NAMES,
)
