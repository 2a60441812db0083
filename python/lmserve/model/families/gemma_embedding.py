"""EmbeddingGemma: Gemma 3 whose tokens see those after them too, within the windows of its layers."""

from __future__ import annotations

from lmserve.model.config import ModelConfig
from lmserve.model.families.family import Family, Tensors
from lmserve.model.families.gemma2 import GGUF_NAMES, Gemma2, shifted_norms
from lmserve.model.families.gemma3 import gguf_config, hf_config
from lmserve.model.gguf_source import GgufModel


def _hf_tensors(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Under the names of the model within a decoder."""
    named = {name if name.startswith("model.") else f"model.{name}": tensor for name, tensor in tensors.items()}
    return shifted_norms(named, config)


def _gguf_config(file: GgufModel) -> ModelConfig:
    return gguf_config(file, causal=False)


def _gguf_tensors(tensors: Tensors, _config: ModelConfig) -> Tensors:
    """Without the dense layers after pooling."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("dense_")}


FAMILY = Family(
    name="gemma_embedding",
    kind="embed",
    hf_architectures=("Gemma3TextModel",),
    hf_config=hf_config,
    hf_tensors=_hf_tensors,
    decoder=Gemma2,
    gguf_architecture="gemma-embedding",
    gguf_config=_gguf_config,
    gguf_names=GGUF_NAMES,
    gguf_tensors=_gguf_tensors,
)
