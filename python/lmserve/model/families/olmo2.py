"""OLMo 2 and 3: norms after attention and feed-forward network alone, and norms of all of q and of all of k.

OLMo 3 has windows in three of four layers; scaling of the rotation is for those without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from lmserve.model.config import ModelConfig, RopeConfig
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
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, gated_mlp, load_gated_mlp
from lmserve.model.rope_config import rope_of

A = TypeVar("A")
W = TypeVar("W")

OLMO3: dict[str, Any] = {"sliding_window": 4096}
PERIOD = 4
GGUF_NAMES = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    third = raw.get("model_type") == "olmo3" or "Olmo3ForCausalLM" in (raw.get("architectures") or ())
    raw = (OLMO3 if third else {}) | {"rms_norm_eps": 1e-5} | raw
    fields = hf_fields("olmo2", raw, default_theta=5e5 if third else 1e4)
    bias = bool(raw.get("attention_bias", False))
    windows = hf_windows(raw, period=PERIOD)
    sliding: RopeConfig = fields["rope"]
    if isinstance((raw.get("rope_parameters") or {}).get(FULL), dict):
        sliding = rope_of(raw, head_dim=fields["head_dim"], context_length=fields["context_length"], layer_type=SLIDING)
    elif third:
        # Before transformers 5: scaling is of the layers without a window alone.
        sliding = RopeConfig(theta=fields["rope"].theta)
    return ModelConfig(
        **fields,
        attention=attention_layers(
            fields, windows=windows, ropes=[fields["rope"] if window is None else sliding for window in windows]
        ),
        attention_bias=bias,
        output_bias=bias,
    )


def _gguf_config(file: GgufModel) -> ModelConfig:
    fields = gguf_fields("olmo2", file)
    windows = gguf_windows(file, period=PERIOD)
    sliding = replace(file.plain_rope("freq_base_swa", fields["rope"].theta))
    return ModelConfig(
        **fields,
        attention=attention_layers(
            fields, windows=windows, ropes=[fields["rope"] if window is None else sliding for window in windows]
        ),
    )


@dataclass(frozen=True, slots=True)
class PostNormLayer(Generic[W]):
    """Loaded weights of one layer."""

    attention: SelfAttention[W]
    post_attention_norm: W
    mlp: GatedMlp[W]
    post_mlp_norm: W


class Olmo2(Generic[A, W]):
    """What attention and feed-forward network give is normed, then added; EXAONE 4 too."""

    def __init__(self, config: ModelConfig, load: Loader[A, W]) -> None:
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)
        ]
        self.norm = load.rms_norm("model.norm", hidden, config.norm_eps)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops, activation = self.ops, self.config.activation
        states = ops.embed(self.embedding)
        for index, layer in enumerate(self.layers):
            attended = attend(ops, states, index, layer.attention)
            if index + 1 == len(self.layers) and sampled_rows_only:
                attended, states = ops.rows(attended), ops.rows(states)
            attended = ops.norm(ops.linear(attended, layer.attention.output), layer.post_attention_norm)
            states = ops.add(attended, states)
            inner = ops.norm(gated_mlp(ops, states, layer.mlp, activation), layer.post_mlp_norm)
            states = ops.add(inner, states)
        return ops.norm(states, self.norm)


def _layer(config: ModelConfig, index: int, load: Loader[A, W]) -> PostNormLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return PostNormLayer(
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
            qk_norm_eps=eps,
            # A head's norms, or one of all of q and one of all of k.
            qk_norm_per_head=config.qk_norm,
        ),
        post_attention_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp=load_gated_mlp(load.within("mlp"), hidden, config.intermediate_size),
        post_mlp_norm=load.rms_norm("post_feedforward_layernorm", hidden, eps),
    )


FAMILY = Family(
    name="olmo2",
    kind="generate",
    hf_architectures=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    hf_config=_hf_config,
    decoder=Olmo2,
    gguf_architecture="olmo2",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
)
