"""Command R and R7B, Command A: attention and feed-forward network side by side behind one layer norm, with adjacent
pairs rotated. Cohere 2 has windows in three of four layers; those without do not rotate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family
from lmserve.model.families.fields import attention_layers, gguf_fields, gguf_windows, hf_fields, hf_windows
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, gated_mlp, load_gated_mlp

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {"logit_scale": 0.0625, "layer_norm_eps": 1e-5}
COHERE2: dict[str, Any] = {"sliding_window": 4096}
PERIOD = 4


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    raw = DEFAULTS | raw
    if raw.get("use_qk_norm"):
        raise CheckpointError("config.json: use_qk_norm (Command R+) is not supported")
    fields = hf_fields("cohere", raw, eps="layer_norm_eps", default_theta=5e5, interleaved=True, tied=True)
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(**fields, attention_bias=bias, output_bias=bias, logits_scale=float(raw["logit_scale"]))


def _hf_config2(raw: dict[str, Any]) -> ModelConfig:
    raw = DEFAULTS | COHERE2 | raw
    fields = hf_fields("cohere2", raw, eps="layer_norm_eps", interleaved=True, tied=True)
    windows = hf_windows(raw, period=int(raw.get("sliding_window_pattern") or PERIOD))
    bias = bool(raw.get("attention_bias", False))
    ropes = [None if window is None else fields["rope"] for window in windows]
    return ModelConfig(
        **fields,
        attention=attention_layers(fields, windows=windows, ropes=ropes),
        attention_bias=bias,
        output_bias=bias,
        logits_scale=float(raw["logit_scale"]),
    )


def _gguf_config(file: GgufModel) -> ModelConfig:
    fields = gguf_fields("cohere", file, eps="layer_norm_epsilon")
    if "blk.0.attn_q_norm.weight" in file.tensors:
        raise CheckpointError(f"{file.path}: norms of q and k (Command R+) are not supported")
    return ModelConfig(**fields, logits_scale=float(file.value("logit_scale", 0.0)) or 1.0)


def _gguf_config2(file: GgufModel) -> ModelConfig:
    fields = gguf_fields("cohere2", file, eps="layer_norm_epsilon")
    windows = gguf_windows(file, period=PERIOD)
    ropes = [None if window is None else fields["rope"] for window in windows]
    return ModelConfig(
        **fields,
        attention=attention_layers(fields, windows=windows, ropes=ropes),
        logits_scale=float(file.value("logit_scale")),
    )


@dataclass(frozen=True, slots=True)
class CohereLayer(Generic[W]):
    """Loaded weights of one layer."""

    input_norm: W
    attention: SelfAttention[W]
    mlp: GatedMlp[W]


class Cohere(Generic[A, W]):
    """States plus attention plus feed-forward network, both of the same normed states."""

    def __init__(self, config: ModelConfig, load: Loader[A, W]) -> None:
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)
        ]
        self.norm = load.layer_norm("model.norm", hidden, config.norm_eps, bias=False)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops, activation = self.ops, self.config.activation
        states = ops.embed(self.embedding)
        normed = ops.norm(states, self.layers[0].input_norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            attended = attend(ops, normed, index, layer.attention)
            if last and sampled_rows_only:
                attended, normed, states = ops.rows(attended), ops.rows(normed), ops.rows(states)
            states = ops.add(ops.linear(attended, layer.attention.output), states)
            inner = gated_mlp(ops, normed, layer.mlp, activation)
            following = self.norm if last else self.layers[index + 1].input_norm
            normed, states = ops.add_norm(inner, states, following)
        return normed


def _layer(config: ModelConfig, index: int, load: Loader[A, W]) -> CohereLayer[W]:
    hidden = config.hidden_size
    return CohereLayer(
        input_norm=load.layer_norm("input_layernorm", hidden, config.norm_eps, bias=False),
        attention=load_self_attention(
            load.within("self_attn"),
            config.attention[index],
            hidden,
            bias=config.attention_bias,
            output_bias=config.output_bias,
        ),
        mlp=load_gated_mlp(load.within("mlp"), hidden, config.intermediate_size),
    )


COHERE = Family(
    name="cohere",
    kind="generate",
    hf_architectures=("CohereForCausalLM",),
    hf_config=_hf_config,
    decoder=Cohere,
    limits="Command R+: norms of q and k",
    gguf_architecture="command-r",
    gguf_config=_gguf_config,
    gguf_interleaved_rope=True,
    hf_interleaved_rope=True,
)
FAMILY = Family(
    name="cohere2",
    kind="generate",
    hf_architectures=("Cohere2ForCausalLM",),
    hf_config=_hf_config2,
    decoder=Cohere,
    gguf_architecture="cohere2",
    gguf_config=_gguf_config2,
    gguf_interleaved_rope=True,
    hf_interleaved_rope=True,
)

FAMILIES = (FAMILY, COHERE)
