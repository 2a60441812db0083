"""What a model is, in numbers: the one form that every checkpoint format is read into."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Self

from lmserve.model.activation import SILU, Activation
from lmserve.model.errors import CheckpointError

# Several times what the largest model that is known has.
LARGEST: Final = {
    "num_layers": 1024,
    "num_heads": 4096,
    "num_kv_heads": 4096,
    "head_dim": 8192,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "context_length": 1 << 28,
}


def check_sizes(config: Any) -> None:
    """Raises CheckpointError for a size of a configuration that is not in [1, its entry of LARGEST]."""
    for name, largest in LARGEST.items():
        size = getattr(config, name, 1)
        if not 1 <= size <= largest:
            raise CheckpointError(f"{name} is {size}; it must be at least 1 and at most {largest}")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. `factor` and what follows it are read only by the scaling kinds that name them.

    kind "none": plain; "linear": positions divided by `factor`; "llama3": low frequencies divided by `factor`, with a
    smooth ramp between `low_freq_factor` and `high_freq_factor`; "yarn": NTK-by-parts between `beta_fast` and
    `beta_slow`; "longrope": in a server whose context is longer than `original_context_length`, `long_factors` in place
    of `frequency_factors`; "proportional": frequencies of the whole head, of which `rotary_dim` elements are rotated.

    Of all kinds: frequencies are divided by `frequency_factors`, one for each pair, where there are any. cos and sin
    are multiplied by `attention_factor`. The first `rotary_dim` elements of a head are rotated (0: all), adjacent ones
    together where `interleaved`, and those half of it apart otherwise.
    """

    theta: float = 10000.0
    kind: str = "none"
    factor: float = 1.0
    original_context_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    frequency_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    rotary_dim: int = 0
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """The attention of one layer, as the KV cache and the kernels need to know it.

    Query head h reads key-value head h // (num_heads / num_kv_heads).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of the product of a query and a key
    rope: RopeConfig | None  # None: positions are not rotated
    # Tokens that a token sees, itself included; None: all before it. Of one that is not causal, so many on each side.
    window: int | None = None
    causal: bool = True  # a token sees no later ones; False: it does, and its text is computed whole
    softcap: float | None = None  # scores are softcap * tanh(scaled product / softcap)
    shares: int | None = None  # the layer whose keys and values it reads, if it has none of its own
    sinks: bool = False  # each head has one more score, whose value is zero
    # (beta, n): queries are multiplied by 1 + beta * ln(1 + floor((position + offset) / n)) (Llama 4, Ministral 3).
    temperature: tuple[float, int] | None = None
    temperature_offset: int = 0

    # Of latent attention (DeepSeek's MLA): one key for all heads, of which the first so many elements are the latent,
    # which is the value too, and the rest is rotated. num_kv_heads is 1.
    latent_rank: int | None = None

    @property
    def rotary_width(self) -> int:
        """Elements of a head that its rotation's tables are for."""
        return self.head_dim - (self.latent_rank or 0)

    @property
    def q_size(self) -> int:
        """Width of one token's queries: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of one token's keys (and of its values): num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class RecurrentLayer:
    """The recurrent state that a layer keeps of a sequence, in fp32, instead of keys and values.

    That is the last `kernel` - 1 inputs of a causal convolution over `channels`, and `heads` matrices [rows, columns].
    `tiled`: where there are n heads of keys and more of values, value head h goes with key head h % n; otherwise the
    first few go with the first, and so on.
    """

    channels: int
    kernel: int
    heads: int = 0
    rows: int = 0
    columns: int = 0
    tiled: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state."""
        return 4 * (self.channels * (self.kernel - 1) + self.heads * self.rows * self.columns)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture of a decoder, what all families have. Lengths in tokens; `head_dim` need not be hidden_size /
    num_heads.

    `attention_bias`: q, k and v have biases; `output_bias`: so has the attention's output; `mlp_bias`: gate, up and
    down. `qk_norm`: each head's q and k pass an RMS norm before they are rotated. `attention`: each layer's; left out,
    all layers are alike.

    In a hybrid `recurrent` has the layers with a recurrent state, `attention` those with keys and values, both in the
    order of the model, and `attention_places` says which of all layers the latter are.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    context_length: int
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: Activation = SILU
    attention: tuple[AttentionLayer, ...] = ()
    attention_places: tuple[int, ...] = ()
    recurrent: tuple[RecurrentLayer, ...] = ()
    logits_scale: float = 1.0
    logits_softcap: float | None = None  # logits are softcap * tanh(scaled logit / softcap)
    # A head that guesses a token ahead is loaded (MTP), whose one layer comes after all others in `attention`.
    mtp: bool = False

    def __post_init__(self) -> None:
        # Before anything is made for each layer.
        check_sizes(self)
        if self.recurrent and not self.attention:
            raise CheckpointError("all layers are recurrent; a model without attention is not supported")
        if not self.attention:
            scale = max(self.head_dim, 1) ** -0.5
            layer = AttentionLayer(self.num_heads, self.num_kv_heads, self.head_dim, scale, self.rope)
            object.__setattr__(self, "attention", (layer,) * self.num_layers)
        if not self.attention_places:
            object.__setattr__(self, "attention_places", tuple(range(len(self.attention))))

    @property
    def q_size(self) -> int:
        """Width of one token's queries: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of one token's keys (and of its values): num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    @property
    def mtp_layer(self) -> str:
        """What names of the tensors begin with that are of a head which guesses a token ahead."""
        return f"model.layers.{self.num_layers}"

    def with_mtp(self, **changes: Any) -> Self:
        """The configuration with such a head, whose attention is that of the last layer with attention."""
        attention, places = (*self.attention, self.attention[-1]), (*self.attention_places, self.num_layers)
        return replace(self, mtp=True, attention=attention, attention_places=places, **changes)

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent state of one sequence; 0: there is none."""
        return sum(layer.state_bytes for layer in self.recurrent)

    @property
    def cached_layers(self) -> tuple[AttentionLayer, ...]:
        """Of the layers that have keys and values of their own."""
        return tuple(layer for layer in self.attention if layer.shares is None)

    @property
    def cache_places(self) -> tuple[int, ...]:
        """For each layer, which of `cached_layers` it reads."""
        places: list[int] = []
        for layer in self.attention:
            own = sum(other.shares is None for other in self.attention[: len(places)])
            places.append(own if layer.shares is None else places[layer.shares])
        return tuple(places)

    @property
    def cache_windows(self) -> tuple[int | None, ...]:
        """For each of `cached_layers` how many tokens those that read it see, the widest of them; None: all."""
        windows: list[list[int | None]] = [[] for _ in self.cached_layers]
        for layer, place in zip(self.attention, self.cache_places, strict=True):
            windows[place].append(layer.window)
        return tuple(
            None if any(window is None for window in seen) else max(window for window in seen if window is not None)
            for seen in windows
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """Architecture of an encoder, whose tokens see those after them too.

    `num_positions`: rows of the table that says where a token stands that are used, after as many as `padding` holds
    that are not; None: there is no such table. `num_segments`: rows of the table that tells a text's first segment from
    its second; None: there is none. `classifier_pooling`: what the head that scores texts is given. `norm_bias`:
    layer norms have biases, where they need not.
    """

    num_positions: int | None = None
    padding: tuple[int, ...] = ()
    num_segments: int | None = 1
    classifier_pooling: str = "cls"
    norm_bias: bool = False


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Shape of the paged KV cache, and how many recurrent states there are, that an `Ops` implementation allocates.

    `dtype` is "fp32", "fp16" or "bf16". Layers with a window have `num_window_blocks` blocks of their own, unless that
    is 0: they have as many as the others, and the same, then.
    """

    block_size: int
    num_blocks: int
    max_model_len: int
    dtype: str
    state_slots: int = 0
    num_window_blocks: int = 0

    def windowed(self, config: ModelConfig) -> tuple[bool, ...]:
        """For each layer whether its keys and values lie in blocks of the layers with a window."""
        windows = config.cache_windows
        return tuple(bool(self.num_window_blocks) and windows[place] is not None for place in config.cache_places)
