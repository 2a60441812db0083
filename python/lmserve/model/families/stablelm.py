"""StableLM 2 and 3B: Llama with layer norms, of whose heads a quarter is rotated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.config import ModelConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family
from lmserve.model.families.fields import gguf_fields, hf_fields
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, gated_mlp, load_gated_mlp

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5}


def _hf_config(raw: dict[str, Any]) -> ModelConfig:
    raw = DEFAULTS | raw
    for key in ("qk_layernorm", "use_parallel_residual"):
        if raw.get(key):
            raise CheckpointError(f"config.json: {key} (StableLM 2 12B) is not supported")
    return ModelConfig(
        **hf_fields("stablelm", raw, eps="layer_norm_eps"), attention_bias=bool(raw.get("use_qkv_bias", False))
    )


def _gguf_config(file: GgufModel) -> ModelConfig:
    if "blk.0.attn_q_norm.weight" in file.tensors or "blk.0.ffn_norm.weight" not in file.tensors:
        raise CheckpointError(
            f"{file.path}: norms of q and k, and attention beside the feed-forward network (StableLM 2 12B) are not"
            " supported"
        )
    fields = gguf_fields("stablelm", file, eps="layer_norm_epsilon")
    return ModelConfig(**fields, attention_bias="blk.0.attn_q.bias" in file.tensors)


@dataclass(frozen=True, slots=True)
class StableLmLayer(Generic[W]):
    """Loaded weights of one layer."""

    input_norm: W
    attention: SelfAttention[W]
    mlp_norm: W
    mlp: GatedMlp[W]


class StableLm(Generic[A, W]):
    """Pre-norm attention and a gated feed-forward network, each added to the residual states."""

    def __init__(self, config: ModelConfig, load: Loader[A, W]) -> None:
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)
        ]
        self.norm = load.layer_norm("model.norm", hidden, config.norm_eps, bias=True)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops, activation = self.ops, self.config.activation
        states = ops.embed(self.embedding)
        normed = ops.norm(states, self.layers[0].input_norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            attended = attend(ops, normed, index, layer.attention)
            if last and sampled_rows_only:
                attended, states = ops.rows(attended), ops.rows(states)
            normed, states = ops.add_norm(ops.linear(attended, layer.attention.output), states, layer.mlp_norm)
            inner = gated_mlp(ops, normed, layer.mlp, activation)
            following = self.norm if last else self.layers[index + 1].input_norm
            normed, states = ops.add_norm(inner, states, following)
        return normed


def _layer(config: ModelConfig, index: int, load: Loader[A, W]) -> StableLmLayer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    return StableLmLayer(
        input_norm=load.layer_norm("input_layernorm", hidden, eps, bias=True),
        attention=load_self_attention(
            load.within("self_attn"), config.attention[index], hidden, bias=config.attention_bias
        ),
        mlp_norm=load.layer_norm("post_attention_layernorm", hidden, eps, bias=True),
        mlp=load_gated_mlp(load.within("mlp"), hidden, config.intermediate_size),
    )


FAMILY = Family(
    name="stablelm",
    kind="generate",
    hf_architectures=("StableLmForCausalLM",),
    hf_config=_hf_config,
    decoder=StableLm,
    limits="StableLM 2 12B: norms of each head of its own, attention beside the feed-forward network",
    gguf_architecture="stablelm",
    gguf_config=_gguf_config,
)
