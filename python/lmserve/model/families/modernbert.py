"""ModernBERT (gte-modernbert, modernbert-embed, granite-embedding-r2): pre-norm, rotated, mostly local attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmserve.model.config import EncoderConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.families.encoder_fields import encoder_config, gguf_sizes, renamed, within
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.fields import FULL, SLIDING
from lmserve.model.gguf_source import GgufModel
from lmserve.model.hf_config import required
from lmserve.model.layers.encoder import Encoder
from lmserve.model.layers.loading import Loader
from lmserve.model.rope_config import rope_of

A = TypeVar("A")
W = TypeVar("W")

PERIOD = 3
LOCAL = 128
THETAS = {FULL: 160_000.0, SLIDING: 10_000.0}
POOLINGS = ("cls", "mean")


def _hf_config(raw: dict[str, Any]) -> EncoderConfig:
    context, layers = int(required(raw, "max_position_embeddings")), int(required(raw, "num_hidden_layers"))
    head_dim = int(required(raw, "hidden_size")) // max(1, int(required(raw, "num_attention_heads")))
    period = int(raw.get("global_attn_every_n_layers") or PERIOD)
    types = raw.get("layer_types") or [SLIDING if index % period else FULL for index in range(layers)]
    if len(types) != layers or set(types) - THETAS.keys():
        raise CheckpointError(f"config.json: each of {layers} layer_types must be {SLIDING} or {FULL}")
    # Half of it on each side, and the token itself.
    window = int(raw.get("local_attention") or LOCAL) // 2 + 1
    ropes = {kind: _rope(raw, kind, head_dim, context) for kind in THETAS}
    pooling = raw.get("classifier_pooling", "cls")
    if pooling not in POOLINGS:
        raise CheckpointError(
            f"config.json: classifier_pooling {pooling!r} is not supported ({', '.join(POOLINGS)} are)"
        )
    return encoder_config(
        "modernbert",
        {"norm_eps": 1e-5} | raw,
        context_length=context,
        ropes=[ropes[kind] for kind in types],
        windows=[window if kind == SLIDING else None for kind in types],
        activation="hidden_activation",
        eps="norm_eps",
        num_segments=None,
        classifier_pooling=pooling,
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        norm_bias=bool(raw.get("norm_bias", False)),
    )


def _rope(raw: dict[str, Any], kind: str, head_dim: int, context: int) -> Any:
    """The rotation of layers of a kind, whose theta has a key of its own before transformers 5."""
    own = raw.get("global_rope_theta" if kind == FULL else "local_rope_theta") or THETAS[kind]
    if isinstance((raw.get("rope_parameters") or {}).get(kind), dict):
        return rope_of(raw, head_dim=head_dim, context_length=context, layer_type=kind, default_theta=float(own))
    plain = raw | {"rope_parameters": None, "rope_theta": own}
    return rope_of(plain, head_dim=head_dim, context_length=context, default_theta=float(own))


def _hf_tensors(tensors: Tensors, _config: EncoderConfig) -> Tensors:
    return renamed(tensors, "model", ())


@dataclass(frozen=True, slots=True)
class ModernBertLayer(Generic[W]):
    """Loaded weights of one layer; the first has no norm before its attention, as the embeddings are normed."""

    attention_norm: W | None
    qkv: W
    attended: W
    mlp_norm: W
    gate_up: W
    down: W


class ModernBert(Encoder[A, W]):
    """Attention and a gated feed-forward network, normed before, each added to the residual states."""

    def __init__(self, config: EncoderConfig, load: Loader[A, W]) -> None:
        hidden, eps, bias = config.hidden_size, config.norm_eps, config.norm_bias
        self.ops, self.config = load.ops, config
        self.words = load.embedding("embeddings.tok_embeddings", config.vocab_size, hidden, head=False)
        self.norm = load.layer_norm("embeddings.norm", hidden, eps, bias=bias)
        self.layers = [_layer(config, index, load.within(f"layers.{index}")) for index in range(config.num_layers)]
        self.final_norm = load.layer_norm("final_norm", hidden, eps, bias=bias)

    def states(self) -> A:
        ops, activation = self.ops, self.config.activation
        states = ops.norm(ops.embed(self.words), self.norm)
        normed = states
        for index, layer in enumerate(self.layers):
            query = ops.rope_and_cache(ops.linear(normed, layer.qkv), index)
            attended = ops.linear(ops.attention(query, index), layer.attended)
            normed, states = ops.add_norm(attended, states, layer.mlp_norm)
            inner = ops.linear(ops.gated(ops.linear(normed, layer.gate_up), activation), layer.down)
            last = index + 1 == len(self.layers)
            following = self.final_norm if last else self.layers[index + 1].attention_norm
            assert following is not None
            normed, states = ops.add_norm(inner, states, following)
        return normed


def _layer(config: EncoderConfig, index: int, load: Loader[A, W]) -> ModernBertLayer[W]:
    hidden, eps, bias = config.hidden_size, config.norm_eps, config.attention_bias
    attention, mlp = load.within("attn"), load.within("mlp")
    return ModernBertLayer(
        attention_norm=load.layer_norm("attn_norm", hidden, eps, bias=config.norm_bias) if index else None,
        qkv=attention.linear({"Wqkv": 3 * hidden}, hidden, bias=bias),
        attended=attention.linear({"Wo": hidden}, hidden, bias=bias),
        mlp_norm=load.layer_norm("mlp_norm", hidden, eps, bias=config.norm_bias),
        gate_up=mlp.linear({"Wi": 2 * config.intermediate_size}, hidden, bias=config.mlp_bias),
        down=mlp.linear({"Wo": hidden}, config.intermediate_size, bias=config.mlp_bias),
    )


GGUF_NAMES = {
    "token_embd": "embeddings.tok_embeddings",
    "token_embd_norm": "embeddings.norm",
    "output_norm": "final_norm",
    "attn_norm": "attn_norm",
    "attn_qkv": "attn.Wqkv",
    "attn_output": "attn.Wo",
    "ffn_norm": "mlp_norm",
    "ffn_up": "mlp.Wi",
    "ffn_down": "mlp.Wo",
}


def _gguf_config(file: GgufModel) -> EncoderConfig:
    sizes, layers = gguf_sizes(file), int(file.value("block_count"))
    head_dim = sizes["hidden_size"] // max(1, sizes["num_attention_heads"])
    window = int(file.value("attention.sliding_window", LOCAL)) // 2 + 1
    pattern = file.value("attention.sliding_window_pattern", PERIOD)
    if not isinstance(pattern, list):
        pattern = [index % max(1, int(pattern)) != 0 for index in range(layers)]
    ropes = {False: file.rope(head_dim), True: file.plain_rope("freq_base_swa", THETAS[SLIDING])}
    return encoder_config(
        "modernbert",
        sizes,
        context_length=int(file.value("context_length")),
        ropes=[ropes[bool(slides)] for slides in pattern],
        windows=[window if slides else None for slides in pattern],
        num_segments=None,
    )


def _gguf_tensors(tensors: Tensors, config: EncoderConfig) -> Tensors:
    return _hf_tensors(within(tensors, "layers."), config)


FAMILY = Family(
    name="modernbert",
    kind="embed",
    hf_architectures=("ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification"),
    hf_config=_hf_config,
    decoder=ModernBert,
    hf_tensors=_hf_tensors,
    gguf_architecture="modern-bert",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_gguf_tensors,
)
