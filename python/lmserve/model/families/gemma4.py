"""Gemma 4 (E2B, E4B, 12B, 26B-A4B, 31B): layers with and without a window have heads of their own sizes, keys that are
values, keys and values shared by the last layers, and embeddings of each layer's own. 26B-A4B has experts beside each
feed-forward network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.activation import GELU_TANH
from lmserve.model.config import AttentionLayer, ModelConfig, RopeConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.expert_tensors import stacked
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import FULL, SLIDING, gguf_fields, gguf_windows, hf_fields, hf_windows
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention
from lmserve.model.layers.experts import ExpertSizes, load_experts, load_router
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp, gated_mlp, load_gated_mlp
from lmserve.model.ops import Ops
from lmserve.model.rope_config import rope_of
from lmserve.model.router import Router, experts_of
from lmserve.model.tensors import constant

A = TypeVar("A")
W = TypeVar("W")

DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": None,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}
PERIOD = 6
# Of the numbers of a router, which GGUF has beside the matrices.
GGUF_SCALES = {".router.proj.scale": ".router.scale", ".experts.down_proj.scale": ".router.per_expert_scale"}
GLOBAL_HEAD_DIM = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma4Config(ModelConfig):
    """What other families do not have.

    `inner_sizes`: intermediate_size of each layer. `layer_width`: of the embeddings of each layer's own, None where
    there are none; `layer_vocab_size`: their number. `keys_are_values`: for each layer, whether its k_proj gives both.
    `num_experts` of width `expert_size`, chosen by `router`: None where there are none.
    """

    inner_sizes: tuple[int, ...]
    layer_width: int | None
    layer_vocab_size: int
    keys_are_values: tuple[bool, ...]
    num_experts: int | None = None
    expert_size: int | None = None
    router: Router | None = None


def _hf_config(raw: dict[str, Any]) -> Gemma4Config:
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    fields = hf_fields("gemma4", raw, tied=True)
    layers = fields["num_layers"]
    windows = hf_windows(raw, period=PERIOD)
    # As the reference has it, whatever layer_types says.
    windows[-1] = None
    kv_heads, sizes = _global_sizes(raw, layers)
    keys_are_values = bool(raw.get("attention_k_eq_v", False))
    sliding = rope_of(raw, head_dim=fields["head_dim"], context_length=fields["context_length"], layer_type=SLIDING)
    full = rope_of(raw, head_dim=sizes, context_length=fields["context_length"], layer_type=FULL)
    first_shared = layers - int(raw["num_kv_shared_layers"])
    wide = 2 if raw.get("use_double_wide_mlp") else 1
    return Gemma4Config(
        **fields | {"rope": full},
        attention=_attention(
            windows,
            fields["num_heads"],
            (fields["num_kv_heads"], kv_heads),
            (fields["head_dim"], sizes),
            (sliding, full),
            first_shared,
        ),
        logits_softcap=raw["final_logit_softcapping"],
        inner_sizes=tuple(
            fields["intermediate_size"] * (wide if index >= first_shared else 1) for index in range(layers)
        ),
        layer_width=int(raw["hidden_size_per_layer_input"]) or None,
        layer_vocab_size=int(raw["vocab_size_per_layer_input"]),
        keys_are_values=tuple(keys_are_values and window is None for window in windows),
        **(_experts(raw) if raw.get("enable_moe_block") else {}),
    )


def _experts(raw: dict[str, Any]) -> dict[str, Any]:
    count, top_k = experts_of(raw, "num_experts"), experts_of(raw, "top_k_experts", "num_experts_per_tok")
    return {
        "num_experts": count,
        "expert_size": experts_of(raw, "moe_intermediate_size", "expert_intermediate_size"),
        "router": Router("softmax", top_k, normalized=True).check(count),
    }


def _global_sizes(raw: dict[str, Any], layers: int) -> tuple[int, int]:
    """Key-value heads and head_dim of the layers without a window."""
    heads = raw.get("num_global_key_value_heads") if raw.get("attention_k_eq_v") else None
    own = raw.get("per_layer_config")
    changes = dict(own.get(str(layers - 1)) or {}) if isinstance(own, dict) else {}
    kv_heads = changes.get("num_key_value_heads") or heads or raw["num_key_value_heads"]
    return int(kv_heads), int(changes.get("head_dim") or raw.get("global_head_dim") or GLOBAL_HEAD_DIM)


def _attention(
    windows: Sequence[int | None],
    num_heads: int,
    kv_heads: tuple[int, int],
    head_dims: tuple[int, int],
    ropes: tuple[RopeConfig, RopeConfig],
    first_shared: int,
) -> tuple[AttentionLayer, ...]:
    """Pairs are of the layers with a window, and of those without.

    The layers from `first_shared` on read the keys and values of the last before it that is of their kind.
    """
    layers: list[AttentionLayer] = []
    last: dict[bool, int] = {}
    for index, window in enumerate(windows):
        full = window is None
        shares = last.get(full) if index >= first_shared else None
        if index < first_shared:
            last[full] = index
        elif shares is None:
            raise CheckpointError(f"layer {index} shares keys and values, but no layer of its kind before it has any")
        layers.append(
            AttentionLayer(num_heads, kv_heads[full], head_dims[full], 1.0, ropes[full], window=window, shares=shares)
        )
    return tuple(layers)


def _gguf_config(file: GgufModel) -> Gemma4Config:
    fields = gguf_fields("gemma4", file, experts=True) | {"activation": GELU_TANH}
    layers, windows = fields["num_layers"], gguf_windows(file, period=PERIOD)
    head_dim = int(file.value("attention.key_length_swa"))
    heads = file.value("attention.head_count_kv")
    heads = heads if isinstance(heads, list) else [heads] * layers
    of = {window is None: int(count) for window, count in zip(windows, heads, strict=True)}
    inner = file.value("feed_forward_length")
    sliding = file.plain_rope("freq_base_swa", 1e4)
    first_shared = layers - int(file.value("attention.shared_kv_layers", 0))
    width = int(file.value("embedding_length_per_layer_input", 0)) or None
    table = file.tensors.get("per_layer_token_embd.weight")
    return Gemma4Config(
        **fields | {"num_kv_heads": of.get(False, of[True]), "head_dim": head_dim},
        attention=_attention(
            windows,
            fields["num_heads"],
            (of.get(False, of[True]), of.get(True, of[False])),
            (head_dim, fields["head_dim"]),
            (sliding, fields["rope"]),
            first_shared,
        ),
        logits_softcap=file.value("final_logit_softcapping", 0.0) or None,
        inner_sizes=tuple(int(size) for size in (inner if isinstance(inner, list) else [inner] * layers)),
        layer_width=width,
        layer_vocab_size=fields["vocab_size"] if table is None else table.shape[0],
        keys_are_values=tuple(
            f"blk.{index}.attn_v.weight" not in file.tensors and index < first_shared for index in range(layers)
        ),
        **(_gguf_experts(file) if file.value("expert_count", 0) else {}),
    )


def _gguf_experts(file: GgufModel) -> dict[str, Any]:
    count = int(file.value("expert_count"))
    return {
        "num_experts": count,
        "expert_size": int(file.value("expert_feed_forward_length")),
        "router": Router("softmax", int(file.value("expert_used_count")), normalized=True).check(count),
    }


def _loaded(tensors: Tensors, config: Gemma4Config) -> Tensors:
    """Without what is stored and never read: keys, values and their norms of the layers that share another's."""
    unused = {
        f"model.layers.{index}.self_attn.{part}.weight"
        for index, layer in enumerate(config.attention)
        if layer.shares is not None
        for part in ("k_proj", "v_proj", "k_norm", "v_norm")
    }
    kept = {name: tensor for name, tensor in tensors.items() if name not in unused}
    return kept if config.num_experts is None else stacked(kept, config.num_experts)


def _gguf_tensors(tensors: Tensors, config: Gemma4Config) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        changed = name.removesuffix(".weight") if name.endswith(".layer_scalar.weight") else name
        for part, other in GGUF_SCALES.items():
            changed = changed.replace(part, other)
        renamed[changed] = tensor
    return _loaded(renamed, config)


@dataclass(frozen=True, slots=True)
class LayerInputs(Generic[W]):
    """Loaded weights of what the embeddings of a layer's own pass."""

    gate: W
    projection: W
    post_norm: W


@dataclass(frozen=True, slots=True)
class Gemma4Experts(Generic[W]):
    """Loaded weights of the experts beside a feed-forward network, and of the norms around both."""

    router_norm: W
    router: W
    input_norm: W
    experts: W
    post_mlp_norm: W
    post_experts_norm: W


@dataclass(frozen=True, slots=True)
class Gemma4Layer(Generic[W]):
    """Loaded weights of one layer."""

    input_norm: W
    attention: SelfAttention[W]
    v_norm: W | None
    post_attention_norm: W
    mlp_norm: W
    mlp: GatedMlp[W]
    experts: Gemma4Experts[W] | None
    post_mlp_norm: W
    inputs: LayerInputs[W] | None
    scalar: float


class Gemma4(Generic[A, W]):
    """Attention and feed-forward network, normed before and after, then the layer's own embeddings."""

    def __init__(self, config: Gemma4Config, load: Loader[A, W]) -> None:
        hidden, tied, width = config.hidden_size, config.tie_word_embeddings, config.layer_width
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}")) for index in range(config.num_layers)
        ]
        self.norm = load.rms_norm("model.norm", hidden, config.norm_eps)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)
        self.own: tuple[W, W, W] | None = None
        if width is not None:
            rows = config.num_layers * width
            self.own = (
                load.embedding("model.embed_tokens_per_layer", config.layer_vocab_size, rows, head=False),
                load.linear({"model.per_layer_model_projection": rows}, hidden),
                load.rms_norm("model.per_layer_projection_norm", width, config.norm_eps),
            )

    def _layer_inputs(self, states: A) -> A | None:
        """[T, layers * width]: each layer's own embeddings of the tokens, and a projection of the common ones."""
        if self.own is None:
            return None
        ops, (table, projection, norm) = self.ops, self.own
        width = self.config.layer_width or 1
        projected = ops.scale(ops.linear(states, projection), self.config.hidden_size**-0.5)
        own = ops.embed(table, width**0.5)
        return ops.scale(ops.add(ops.norm(projected, norm), own), 2**-0.5)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops, config = self.ops, self.config
        states = ops.embed(self.embedding, config.hidden_size**0.5)
        own = self._layer_inputs(states)
        for index, layer in enumerate(self.layers):
            attention = layer.attention
            qkv = ops.linear(ops.norm(states, layer.input_norm), attention.qkv)
            query = ops.rope_and_cache(qkv, index, attention.q_norm, attention.k_norm, layer.v_norm)
            attended = ops.attention(query, index)
            if index + 1 == len(self.layers) and sampled_rows_only:
                attended, states = ops.rows(attended), ops.rows(states)
                own = None if own is None else ops.rows(own)
            attended = ops.norm(ops.linear(attended, attention.output), layer.post_attention_norm)
            normed, states = ops.add_norm(attended, states, layer.mlp_norm)
            inner = gated_mlp(ops, normed, layer.mlp, config.activation)
            if layer.experts is not None:
                inner = _with_experts(ops, inner, states, layer.experts)
            states = ops.add(ops.norm(inner, layer.post_mlp_norm), states)
            if own is not None and layer.inputs is not None:
                start = index * (config.layer_width or 0)
                gated = ops.activate(ops.linear(states, layer.inputs.gate), config.activation, own, start)
                given = ops.norm(ops.linear(gated, layer.inputs.projection), layer.inputs.post_norm)
                states = ops.add(given, states)
            states = ops.scale(states, layer.scalar)
        return ops.norm(states, self.norm)


def _with_experts(ops: Ops[A, W], inner: A, states: A, weights: Gemma4Experts[W]) -> A:
    """What the feed-forward network made of the states, `inner`, and what the experts make of them."""
    routing = ops.route(ops.norm(states, weights.router_norm), weights.router)
    mixed = ops.experts(ops.norm(states, weights.input_norm), routing, weights.experts)
    return ops.add(ops.norm(mixed, weights.post_experts_norm), ops.norm(inner, weights.post_mlp_norm))


def _load_experts(config: Gemma4Config, load: Loader[A, W]) -> Gemma4Experts[W] | None:
    if config.num_experts is None or config.expert_size is None or config.router is None:
        return None
    hidden, eps = config.hidden_size, config.norm_eps
    # The norm has no weight; what follows it is the router's.
    scale = load.tensor("router.scale", (hidden,)).dequantize() * hidden**-0.5
    sizes = ExpertSizes(config.num_experts, config.expert_size)
    return Gemma4Experts(
        router_norm=load.ops.load_rms_norm(constant("router.scale", scale.tolist()), eps),
        router=load_router(
            load, "router.proj", config.router, config.num_experts, hidden, scale="router.per_expert_scale"
        ),
        input_norm=load.rms_norm("pre_feedforward_layernorm_2", hidden, eps),
        experts=load_experts(load.within("experts"), sizes, hidden, config.activation),
        post_mlp_norm=load.rms_norm("post_feedforward_layernorm_1", hidden, eps),
        post_experts_norm=load.rms_norm("post_feedforward_layernorm_2", hidden, eps),
    )


def _layer(config: Gemma4Config, index: int, load: Loader[A, W]) -> Gemma4Layer[W]:
    hidden, eps, width, shape = config.hidden_size, config.norm_eps, config.layer_width, config.attention[index]
    own = load.within("self_attn")
    sizes = [("q_proj", shape.q_size)]
    if shape.shares is None:
        value = "k_proj" if config.keys_are_values[index] else "v_proj"
        sizes += [("k_proj", shape.kv_size), (value, shape.kv_size)]
    cached = shape.shares is None
    return Gemma4Layer(
        input_norm=load.rms_norm("input_layernorm", hidden, eps),
        attention=SelfAttention(
            qkv=own.linear(sizes, hidden),
            output=own.linear({"o_proj": hidden}, shape.q_size),
            q_norm=own.rms_norm("q_norm", shape.head_dim, eps),
            k_norm=own.rms_norm("k_norm", shape.head_dim, eps) if cached else None,
        ),
        v_norm=load.unweighted_rms_norm(shape.head_dim, eps) if cached else None,
        post_attention_norm=load.rms_norm("post_attention_layernorm", hidden, eps),
        mlp_norm=load.rms_norm("pre_feedforward_layernorm", hidden, eps),
        mlp=load_gated_mlp(load.within("mlp"), hidden, config.inner_sizes[index]),
        experts=_load_experts(config, load),
        post_mlp_norm=load.rms_norm("post_feedforward_layernorm", hidden, eps),
        inputs=None
        if width is None
        else LayerInputs(
            gate=load.linear({"per_layer_input_gate": width}, hidden),
            projection=load.linear({"per_layer_projection": hidden}, width),
            post_norm=load.rms_norm("post_per_layer_input_norm", hidden, eps),
        ),
        scalar=load.number("layer_scalar"),
    )


FAMILY = Family(
    name="gemma4",
    kind="generate",
    hf_architectures=(
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForCausalLM",
        "Gemma4UnifiedForConditionalGeneration",
    ),
    hf_config=_hf_config,
    hf_tensors=_loaded,
    decoder=Gemma4,
    limits="images and sound",
    gguf_architecture="gemma4",
    gguf_config=_gguf_config,
    gguf_names={
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "layer_output_scale": "layer_scalar",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
        "ffn_gate_inp": "router.proj",
        "ffn_gate_exps": "experts.gate_proj",
        "ffn_up_exps": "experts.up_proj",
        "ffn_gate_up_exps": "experts.gate_up_proj",
        "ffn_down_exps": "experts.down_proj",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "per_layer_token_embd": "model.embed_tokens_per_layer",
        "per_layer_model_proj": "model.per_layer_model_projection",
        "per_layer_proj_norm": "model.per_layer_projection_norm",
    },
    gguf_tensors=_gguf_tensors,
)
