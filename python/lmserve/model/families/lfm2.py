"""LFM2 and LFM2.5, dense: short convolutions, and attention in some layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.config import ModelConfig, RecurrentLayer
from lmserve.model.errors import CheckpointError
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import FULL, gguf_fields, gguf_windows, hf_fields, hybrid_layers
from lmserve.model.families.recurrent_tensors import conv_tensor
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.attention import SelfAttention, attend
from lmserve.model.layers.experts import Experts
from lmserve.model.layers.loading import Loader
from lmserve.model.layers.mlp import GatedMlp
from lmserve.model.layers.pre_norm import feed_forward
from lmserve.model.layers.short_conv import ShortConv, load_short_conv, short_conv

A = TypeVar("A")
W = TypeVar("W")

CONV = "conv"
GGUF_NAMES = {
    "token_embd_norm": "model.embedding_norm",
    "attn_norm": "operator_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lfm2Config(ModelConfig):
    """`conv_bias`: the convolutions and the linear layers around them have biases."""

    conv_bias: bool


def _hf_config(raw: dict[str, Any]) -> Lfm2Config:
    tied = bool(raw.get("tie_embedding", raw.get("tie_word_embeddings", True)))
    inner = {"intermediate_size": _inner_size(raw), "tie_word_embeddings": tied}
    fields = hf_fields("lfm2", raw | inner, eps="norm_eps", default_theta=1e6)
    fields |= hf_convs(raw, fields)
    return Lfm2Config(**fields, qk_norm=True, conv_bias=bool(raw.get("conv_bias", False)))


def hf_convs(raw: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` that say which layers are convolutions."""
    types = raw.get("layer_types")
    if types is None:
        full = raw.get("full_attn_idxs")
        layers = range(fields["num_layers"])
        types = [FULL if full is None or index in full else CONV for index in layers]
    unknown = sorted(set(types) - {FULL, CONV})
    if unknown or len(types) != fields["num_layers"]:
        given = f"{unknown[0]!r} is among them" if unknown else f"there are {len(types)}"
        layers = fields["num_layers"]
        raise CheckpointError(f"config.json: each of {layers} layer_types must be {FULL} or {CONV}, but {given}")
    state = RecurrentLayer(channels=fields["hidden_size"], kernel=int(raw.get("conv_L_cache", 3)))
    return hybrid_layers(fields, [kind == CONV for kind in types], state)


def _inner_size(raw: dict[str, Any]) -> int:
    """The width of the feed-forward network, which the configuration gives before it is cut to what is used."""
    size = int(raw.get("block_ff_dim") or raw.get("intermediate_size") or 12288)
    if not raw.get("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    multiplier, multiple = raw.get("block_ffn_dim_multiplier", 1.0), int(raw.get("block_multiple_of", 256))
    if multiplier is not None:
        size = int(multiplier * size)
        size = -(-size // multiple) * multiple
    return size


def _gguf_config(file: GgufModel) -> Lfm2Config:
    fields = gguf_fields("lfm2", file)
    return Lfm2Config(**fields, **gguf_convs(file, fields), qk_norm=True, conv_bias=gguf_conv_bias(file))


def gguf_convs(file: GgufModel, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` that say which layers are convolutions."""
    kv_heads = file.value("attention.head_count_kv")
    if not isinstance(kv_heads, list):
        raise CheckpointError(f"{file.path}: attention.head_count_kv must say for each layer whether it is 0")
    state = RecurrentLayer(channels=fields["hidden_size"], kernel=int(file.value("shortconv.l_cache")))
    return hybrid_layers(fields, [heads == 0 for heads in kv_heads], state, windows=gguf_windows(file, period=0))


def gguf_conv_bias(file: GgufModel) -> bool:
    """Whether convolutions and the linear layers around them have biases."""
    return any(name.endswith("shortconv.in_proj.bias") for name in file.tensors)


def gguf_tensors(tensors: Tensors, _config: ModelConfig) -> Tensors:
    """The tensors with those of convolutions in the shape that is loaded."""
    is_conv = ".conv.conv.weight"
    return {name: conv_tensor(tensor) if name.endswith(is_conv) else tensor for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class Lfm2Layer(Generic[W]):
    """Loaded weights of one layer; `place` is its entry of the configuration's `attention` or `recurrent`."""

    place: int
    operator_norm: W
    operator: SelfAttention[W] | ShortConv[W]
    ffn_norm: W
    mlp: GatedMlp[W] | Experts[W]


class ConvDecoder(Generic[A, W]):
    """An operator, attention or short convolution, and a feed-forward network, each behind a norm.

    `mlp` loads the network of a layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        load: Loader[A, W],
        mlp: Callable[[int, Loader[A, W]], GatedMlp[W] | Experts[W]],
        *,
        conv_bias: bool,
    ) -> None:
        hidden, tied = config.hidden_size, config.tie_word_embeddings
        self.ops, self.config = load.ops, config
        self.embedding = load.embedding("model.embed_tokens", config.vocab_size, hidden, head=tied)
        self.layers = [
            _layer(config, index, load.within(f"model.layers.{index}"), mlp, conv_bias=conv_bias)
            for index in range(config.num_layers)
        ]
        self.norm = load.rms_norm("model.embedding_norm", hidden, config.norm_eps)
        self.head = self.embedding if tied else load.linear({"lm_head": config.vocab_size}, hidden)

    def forward(self, *, sampled_rows_only: bool) -> A:
        ops = self.ops
        states = ops.embed(self.embedding)
        normed = ops.norm(states, self.layers[0].operator_norm)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            if isinstance(layer.operator, ShortConv):
                mixed = short_conv(ops, normed, layer.place, layer.operator)
            else:
                mixed = attend(ops, normed, layer.place, layer.operator)
            if last and sampled_rows_only:
                mixed, states = ops.rows(mixed), ops.rows(states)
            normed, states = ops.add_norm(ops.linear(mixed, layer.operator.output), states, layer.ffn_norm)
            following = self.norm if last else self.layers[index + 1].operator_norm
            inner = feed_forward(ops, normed, layer.mlp, self.config.activation)
            normed, states = ops.add_norm(inner, states, following)
        return normed


class Lfm2(ConvDecoder[A, W]):
    """A gated feed-forward network in each layer."""

    def __init__(self, config: Lfm2Config, load: Loader[A, W]) -> None:
        super().__init__(config, load, lambda _index, own: load_mlp(config, own), conv_bias=config.conv_bias)


def load_mlp(config: ModelConfig, load: Loader[A, W]) -> GatedMlp[W]:
    """w1, w3 and w2."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return GatedMlp(gate_up=load.linear({"w1": inner, "w3": inner}, hidden), down=load.linear({"w2": hidden}, inner))


def _layer(
    config: ModelConfig,
    index: int,
    load: Loader[A, W],
    mlp: Callable[[int, Loader[A, W]], GatedMlp[W] | Experts[W]],
    *,
    conv_bias: bool,
) -> Lfm2Layer[W]:
    hidden, eps = config.hidden_size, config.norm_eps
    operator: SelfAttention[W] | ShortConv[W]
    if index in config.attention_places:
        place = config.attention_places.index(index)
        operator = _attention(config, place, load.within("self_attn"))
    else:
        place = index - sum(other < index for other in config.attention_places)
        operator = load_short_conv(load.within("conv"), config.recurrent[place], hidden, bias=conv_bias)
    return Lfm2Layer(
        place=place,
        operator_norm=load.rms_norm("operator_norm", hidden, eps),
        operator=operator,
        ffn_norm=load.rms_norm("ffn_norm", hidden, eps),
        mlp=mlp(index, load.within("feed_forward")),
    )


def _attention(config: ModelConfig, place: int, load: Loader[A, W]) -> SelfAttention[W]:
    shape, hidden, eps = config.attention[place], config.hidden_size, config.norm_eps
    sizes = {"q_proj": shape.q_size, "k_proj": shape.kv_size, "v_proj": shape.kv_size}
    return SelfAttention(
        qkv=load.linear(sizes, hidden),
        output=load.linear({"out_proj": hidden}, shape.q_size),
        q_norm=load.rms_norm("q_layernorm", shape.head_dim, eps),
        k_norm=load.rms_norm("k_layernorm", shape.head_dim, eps),
    )


FAMILY = Family(
    name="lfm2",
    kind="generate",
    hf_architectures=("Lfm2ForCausalLM",),
    hf_config=_hf_config,
    decoder=Lfm2,
    gguf_architecture="lfm2",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=gguf_tensors,
)
