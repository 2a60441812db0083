"""What distinguishes one model family's checkpoints from another's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmserve.model.config import EncoderConfig, ModelConfig
from lmserve.model.tensors import TensorSource

Tensors = dict[str, TensorSource]


def _unchanged(tensors: Tensors, _config: ModelConfig | EncoderConfig) -> Tensors:
    return tensors


@dataclass(frozen=True, slots=True)
class Family:
    """How to read a family's checkpoints into a configuration and tensors under their canonical names.

    Canonical names are those of Hugging Face's Llama (of its Bert for encoders).
    """

    name: str
    kind: str  # "generate" or "embed"
    hf_architectures: tuple[str, ...]
    hf_config: Callable[[dict[str, Any]], ModelConfig | EncoderConfig]
    hf_tensors: Callable[[Tensors, Any], Tensors] = _unchanged
    gguf_architecture: str | None = None
    # GGUF stores q and k of these families with each rotated pair in adjacent rows.
    gguf_interleaved_rope: bool = False
