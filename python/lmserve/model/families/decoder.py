"""The decoder of every generating family: pre-norm attention and a gated feed-forward network, on the set of `Ops`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from lmserve.model.config import ModelConfig
from lmserve.model.ops import Ops
from lmserve.model.tensors import TensorSource

A = TypeVar("A")
W = TypeVar("W")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every tensor that a decoder of this configuration has."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (config.q_size, hidden, config.attention_bias),
        "self_attn.k_proj": (config.kv_size, hidden, config.attention_bias),
        "self_attn.v_proj": (config.kv_size, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, config.q_size, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
        if config.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


@dataclass(frozen=True, slots=True)
class DecoderLayer(Generic[W]):
    """Loaded weights of one layer."""

    attention_norm: W
    qkv: W
    q_norm: W | None
    k_norm: W | None
    output: W
    mlp_norm: W
    gate_up: W
    down: W


class Decoder(Generic[A, W]):
    """The loaded model. `tensors` have the names and shapes of `expected_tensors`."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, TensorSource], ops: Ops[A, W]) -> None:
        self.eps = config.rms_norm_eps
        self.ops = ops
        self.embedding = ops.load_embedding(tensors["model.embed_tokens.weight"], head=config.tie_word_embeddings)
        self.layers = [_load_layer(f"model.layers.{i}", tensors, ops) for i in range(config.num_layers)]
        self.norm = ops.load_norm(tensors["model.norm.weight"])
        self.head = self.embedding if config.tie_word_embeddings else ops.load_linear([tensors["lm_head.weight"]])

    def forward(self, *, sampled_rows_only: bool) -> A:
        """States after the final norm of the step that `ops.begin` started: [R, hidden], or else of all [T, hidden]."""
        ops, eps = self.ops, self.eps
        states = ops.embed(self.embedding)
        normed = ops.rms_norm(states, self.layers[0].attention_norm, eps)
        for index, layer in enumerate(self.layers):
            query = ops.rope_and_cache(ops.linear(normed, layer.qkv), index, layer.q_norm, layer.k_norm)
            attended = ops.attention(query, index)
            last = index + 1 == len(self.layers)
            if last and sampled_rows_only:
                attended, states = ops.rows(attended), ops.rows(states)
            normed, states = ops.add_rms_norm(ops.linear(attended, layer.output), states, layer.mlp_norm, eps)
            inner = ops.silu_mul(ops.linear(normed, layer.gate_up))
            following = self.norm if last else self.layers[index + 1].attention_norm
            normed, states = ops.add_rms_norm(ops.linear(inner, layer.down), states, following, eps)
        return normed


def _load_layer(layer: str, tensors: Mapping[str, TensorSource], ops: Ops[A, W]) -> DecoderLayer[W]:
    def linear(*names: str) -> W:
        weights = [tensors[f"{layer}.{name}.weight"] for name in names]
        bias = [tensors[f"{layer}.{name}.bias"] for name in names if f"{layer}.{name}.bias" in tensors]
        return ops.load_linear(weights, bias or None)

    def norm(name: str) -> W:
        return ops.load_norm(tensors[f"{layer}.{name}.weight"])

    qk_norm = f"{layer}.self_attn.q_norm.weight" in tensors
    return DecoderLayer(
        attention_norm=norm("input_layernorm"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=norm("self_attn.q_norm") if qk_norm else None,
        k_norm=norm("self_attn.k_norm") if qk_norm else None,
        output=linear("self_attn.o_proj"),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )
