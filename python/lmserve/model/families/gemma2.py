"""Gemma 2: norms before and after attention and feed-forward network, soft-caps, every other layer with a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.activation import GELU_TANH
from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import attention_layers, gguf_fields, gguf_windows, hf_fields, hf_windows
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, gated_mlp, load_gated_mlp
from lmserve.model.tensors import ShiftedTensor

A = TypeVar("A")
W = TypeVar("W")

# As config.json may leave them out.
DEFAULTS: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GGUF_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# The layers of the 27B model, whose queries are scaled by hidden_size / num_heads.
LARGE = 46


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    raw = DEFAULTS | raw
    fields = hf_fields("gemma2", raw, tied=True)
    return ModelConfig(
        **fields,
        attention=attention_layers(
            fields,
            windows=_alternating(hf_windows(raw), raw),
            scale=float(raw["query_pre_attn_scalar"]) ** -0.5,
            softcap=raw["attn_logit_softcapping"],
        ),
        logits_softcap=raw["final_logit_softcapping"],
    )


def _alternating(windows: list[int | None], raw: dict[str, Any]) -> list[int | None]:
    """The windows of layer_types, or else of every other layer, from the first on."""
    if raw.get("layer_types") is not None:
        return windows
    return [window if index % 2 == 0 else None for index, window in enumerate(windows)]


def _gguf_config(file: GgufModel) -> ModelConfig:
    fields = gguf_fields("gemma2", file) | {"activation": GELU_TANH}
    width = fields["hidden_size"] // fields["num_heads"] if fields["num_layers"] == LARGE else fields["head_dim"]
    return ModelConfig(
        **fields,
        attention=attention_layers(
            fields,
            windows=gguf_windows(file, period=2),
            scale=width**-0.5,
            softcap=file.value("attn_logit_softcapping", 50.0),
        ),
        logits_softcap=file.value("final_logit_softcapping", 30.0),
    )


def shifted_norms(tensors: Tensors, _config: ModelConfig) -> Tensors:
    """Weights of norms as they are multiplied by: 1 + what is stored. GGUF files have them so."""
    return {
        name: ShiftedTensor(tensor, 1.0) if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()
    }


@dataclass(frozen=True, slots=True)
class Gemma2Layer(Generic[W]):
    """Loaded weights of one layer."""

    input_norm: W
    attention: SelfAttention[W]
    post_attention_norm: W
    mlp_norm: W
    mlp: GatedMlp[W]
    post_mlp_norm: W


class Gemma2(Generic[A, W]):
    """Attention and feed-forward network, normed before and after; Gemma 3 too, whose q and k are normed."""

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
        states = ops.embed(self.embedding, self.config.hidden_size**0.5)
        normed = ops.norm(states, self.layers[0].input_norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            attended = attend(ops, normed, index, layer.attention)
            if last and sampled_rows_only:
                attended, states = ops.rows(attended), ops.rows(states)
            attended = ops.norm(ops.linear(attended, layer.attention.output), layer.post_attention_norm)
            normed, states = ops.add_norm(attended, states, layer.mlp_norm)
            inner = ops.norm(gated_mlp(ops, normed, layer.mlp, activation), layer.post_mlp_norm)
            following = self.norm if last else self.layers[index + 1].input_norm
            normed, states = ops.add_norm(inner, states, following)
        return normed


def _layer(config: ModelConfig, index: int, load: Loader[A, W]) -> Gemma2Layer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return Gemma2Layer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=load_self_attention(
            load.within("self_attn"), config.attention[index], hidden, qk_norm_eps=eps if config.qk_norm else None
        ),
        post_attention_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp_norm=load.rms_norm("pre_feedforward_layernorm", hidden, eps),
        mlp=load_gated_mlp(load.within("mlp"), hidden, config.intermediate_size),
        post_mlp_norm=load.rms_norm("post_feedforward_layernorm", hidden, eps),
    )


FAMILY = Family(
    name="gemma2",
    kind="generate",
    hf_architectures=("Gemma2ForCausalLM",),
    hf_config=_hf_config,
    hf_tensors=shifted_norms,
    decoder=Gemma2,
    gguf_architecture="gemma2",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
)
