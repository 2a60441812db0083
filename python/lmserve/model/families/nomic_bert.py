"""Nomic BERT (nomic-embed-text): BERT whose positions are rotated, with a gated feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.config import EncoderConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.encoder_fields import encoder_config, gguf_sizes, renamed, segment_rows, split, within
from lmserve.model.families.family import Family, Tensors
from lmserve.model.gguf_source import GgufModel
from lmserve.model.hf_config import required
from lmserve.model.layers.attention import SelfAttention, attend, load_self_attention
from lmserve.model.layers.loading import Loader
from lmserve.model.ops import Ops
from lmserve.model.rope_config import rope_of
from lmserve.model.score_head import scores_pairs

A = TypeVar("A")
W = TypeVar("W")

THETA = 1000.0
# What config.json calls them in the publisher's own form.
KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
    "rotary_emb_base": "rope_theta",
}
# What the publisher's code can do besides, and no dense model of theirs does.
REFUSED = {
    "prenorm": False,
    "rotary_emb_interleaved": False,
    "rotary_emb_fraction": 1.0,
    "use_rms_norm": False,
    "parallel_block": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
}
# Of the publisher's form and then of transformers'.
NAMES = (
    (r"^emb_ln", "embeddings.LayerNorm"),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
    (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.fc11\.", ".up_proj."),
    (r"\.fc12\.", ".gate_proj."),
    (r"\.fc2\.", ".down_proj."),
    (r"\.norm1\.", ".post_attention_layernorm."),
    (r"\.norm2\.", ".post_mlp_layernorm."),
)
TYPES = "embeddings.token_type_embeddings.weight"


def _hf_config(raw: dict[str, Any]) -> EncoderConfig:
    if raw.get("num_experts") and raw.get("moe_every_n_layers"):
        raise CheckpointError("config.json: num_experts (nomic-embed-text-v2-moe) is not supported")
    for key, value in REFUSED.items():
        if raw.get(key) is not None and raw[key] != value:
            raise CheckpointError(f"config.json: {key} {raw[key]!r} is not supported ({value!r} is)")
    raw = {KEYS.get(key, key): value for key, value in raw.items()}
    if raw.get("hidden_act", "silu") == "swiglu":
        raw["hidden_act"] = "silu"
    context = int(required(raw, "max_position_embeddings"))
    if raw.get("rotary_scaling_factor"):
        # Longer texts are rotated otherwise, each length in its own way.
        context = min(context, int(raw.get("max_trained_positions") or 2048))
    layers = int(required(raw, "num_hidden_layers"))
    head_dim = int(required(raw, "hidden_size")) // max(1, int(required(raw, "num_attention_heads")))
    rope = rope_of(raw, head_dim=head_dim, context_length=context, default_theta=THETA)
    return encoder_config(
        "nomic_bert",
        {"hidden_act": "silu"} | raw,
        context_length=context,
        ropes=[rope] * layers,
        num_segments=min(2, int(raw.get("type_vocab_size", 2))) if scores_pairs(raw) else 1,
    )


def _hf_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    found = split(renamed(tensors, "nomic_bert|bert", NAMES), "qkv_proj", ("q_proj", "k_proj", "v_proj"))
    return found | {TYPES: segment_rows(found, TYPES, config)}


@dataclass(frozen=True, slots=True)
class RotaryBertLayer(Generic[W]):
    """Loaded weights of one layer."""

    attention: SelfAttention[W]
    attention_norm: W
    gate_up: W
    down: W
    norm: W


class RotaryBert(Generic[A, W]):
    """Attention and a gated feed-forward network; each is added to what it was given, and the sum is normalised."""

    def __init__(self, config: EncoderConfig, load: Loader[A, W]) -> None:
        hidden, segments = config.hidden_size, config.num_segments
        self.ops, self.config = load.ops, config
        self.words = load.embedding("embeddings.word_embeddings", config.vocab_size, hidden, head=False)
        self.types: W | None = None
        if segments is not None:
            self.types = load.embedding("embeddings.token_type_embeddings", segments, hidden, head=False)
        self.norm = load.layer_norm("embeddings.LayerNorm", hidden, config.norm_eps, bias=True)
        self.layers = [_layer(config, index, load.within(f"layers.{index}")) for index in range(config.num_layers)]

    @property
    def head(self) -> W:
        """There is none."""
        raise TypeError("an encoder makes no logits")

    def forward(self, *, sampled_rows_only: bool) -> A:
        if sampled_rows_only:
            raise TypeError("an encoder samples nothing")
        ops = self.ops
        words = ops.embed(self.words)
        if self.types is None:
            states = ops.norm(words, self.norm)
        else:
            states, _ = ops.add_norm(ops.embed_places(self.types), words, self.norm)
        for index, layer in enumerate(self.layers):
            attended = ops.linear(attend(ops, states, index, layer.attention), layer.attention.output)
            states, _ = ops.add_norm(attended, states, layer.attention_norm)
            states, _ = ops.add_norm(self._network(ops, states, layer), states, layer.norm)
        return states

    def _network(self, ops: Ops[A, W], states: A, layer: RotaryBertLayer[W]) -> A:
        return ops.linear(ops.gated(ops.linear(states, layer.gate_up), self.config.activation), layer.down)


def _layer(config: EncoderConfig, index: int, load: Loader[A, W]) -> RotaryBertLayer[W]:
    hidden, inner, eps = config.hidden_size, config.intermediate_size, config.norm_eps
    bias, mlp = config.attention_bias, load.within("mlp")
    return RotaryBertLayer(
        attention=load_self_attention(
            load.within("self_attn"), config.attention[index], hidden, bias=bias, output_bias=config.output_bias
        ),
        attention_norm=load.layer_norm("post_attention_layernorm", hidden, eps, bias=True),
        gate_up=mlp.linear({"gate_proj": inner, "up_proj": inner}, hidden),
        down=mlp.linear({"down_proj": hidden}, inner, bias=config.mlp_bias),
        norm=load.layer_norm("post_mlp_layernorm", hidden, eps, bias=True),
    )


GGUF_NAMES = {
    "token_embd": "embeddings.word_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "token_types": "embeddings.token_type_embeddings",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output_norm": "post_attention_layernorm",
    "layer_output_norm": "post_mlp_layernorm",
}


def _gguf_config(file: GgufModel) -> EncoderConfig:
    sizes = gguf_sizes(file) | {"hidden_act": "silu"}
    rope = file.rope(sizes["hidden_size"] // max(1, sizes["num_attention_heads"]))
    layers = int(file.value("block_count"))
    return encoder_config("nomic_bert", sizes, context_length=int(file.value("context_length")), ropes=[rope] * layers)


def _gguf_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    return _hf_tensors(within(tensors, "layers."), config)


FAMILY = Family(
    name="nomic_bert",
    kind="embed",
    hf_architectures=("NomicBertModel", "NomicBertForMaskedLM", "NomicBertForSequenceClassification"),
    hf_config=_hf_config,
    decoder=RotaryBert,
    hf_tensors=_hf_tensors,
    limits="experts",
    gguf_architecture="nomic-bert",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_gguf_tensors,
)
