"""What distinguishes one model family's checkpoints from another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from lmserve.model.config import ModelConfig
from lmserve.model.gguf_source import GgufModel
from lmserve.model.layers.loading import Loader, Shape, expected_tensors
from lmserve.model.ops import DraftOps, Ops
from lmserve.model.tensors import TensorSource

Tensors = dict[str, TensorSource]

A = TypeVar("A")
W = TypeVar("W")
A_co = TypeVar("A_co", covariant=True)
W_co = TypeVar("W_co", covariant=True)


class Decoder(Protocol[A_co, W_co]):
    """A loaded model; an encoder is one without a head."""

    @property
    def head(self) -> W_co:
        """The linear layer that makes logits of final states."""

    def forward(self, *, sampled_rows_only: bool) -> A_co:
        """States after the final norm of the step that `ops.begin` started: [R, hidden], or else of all [T, hidden]."""


@runtime_checkable
class Drafting(Decoder[A, W], Protocol[A, W]):
    """A model with a head that guesses a token ahead."""

    def draft(self, ops: DraftOps[A, W], states: A) -> None:
        """Compute the head for all tokens, of the states [T, hidden] that `forward` gave, and end with `ops.draft`."""


def _unchanged(tensors: Tensors, _config: ModelConfig) -> Tensors:
    return tensors


@dataclass(frozen=True, slots=True)
class Family:
    """How to read a family's checkpoints into a configuration and tensors under their canonical names, and its model.

    Canonical names are those of the family in transformers; what a model file loads says which there are.
    """

    name: str
    kind: str  # "generate" or "embed"
    hf_architectures: tuple[str, ...]
    hf_config: Callable[[dict[str, Any]], ModelConfig]
    decoder: Callable[[Any, Loader[Any, Any]], Decoder[Any, Any]] | None = None  # None: transformers' own
    hf_tensors: Callable[[Tensors, Any], Tensors] = _unchanged
    limits: str = ""  # which of its models, or what of them, is refused
    gguf_architecture: str | None = None
    gguf_experts: bool = False  # the models with experts of an architecture that another family has without them
    gguf_config: Callable[[GgufModel], ModelConfig] | None = None
    gguf_names: Mapping[str, str] = field(default_factory=dict)  # of tensors, where they are not those of Llama
    gguf_tensors: Callable[[Tensors, Any], Tensors] = _unchanged
    # GGUF stores q and k of these families with each rotated pair in adjacent rows.
    gguf_interleaved_rope: bool = False
    hf_interleaved_rope: bool = False  # and so do safetensors
    gguf_folds_factors: bool = False  # GGUF stores weights times factors of the configuration, without these
    # The configuration with the head that guesses a token ahead; None: its models have none that is computed here.
    mtp: Callable[[Any], ModelConfig] | None = None
    by_transformers: bool = False  # transformers computes all but the attention

    def read_gguf(self, file: GgufModel) -> ModelConfig:
        """The configuration of a GGUF file of this family's architecture."""
        if self.gguf_config is None:
            raise TypeError(f"{self.name} has no GGUF files")
        return self.gguf_config(file)

    def expected_tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """Canonical name and shape of every tensor of a model with this configuration."""
        decoder = self.decoder
        if decoder is None:
            raise TypeError(f"{self.name} says nothing of tensors")
        return expected_tensors(lambda load: decoder(config, load))

    def load(self, config: ModelConfig, tensors: Mapping[str, TensorSource], ops: Ops[Any, Any]) -> Decoder[Any, Any]:
        """The model with the weights of a checkpoint that was checked to have them."""
        if self.decoder is None:
            raise TypeError(f"{self.name} says nothing of tensors")
        return self.decoder(config, Loader(ops, lambda name, _shape: tensors[name]))


def _no_config(_: dict[str, Any]) -> ModelConfig:
    raise TypeError("transformers reads this configuration")


# Models that are of none of the families, as far as transformers runs them.
ANY: Final = Family("transformers", "generate", hf_architectures=(), hf_config=_no_config, by_transformers=True)
