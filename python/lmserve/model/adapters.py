"""Opens adapters for a model whose weights need not be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lmserve.model.adapter_files import Adapter, read_adapter
from lmserve.model.adapter_gguf import for_gguf
from lmserve.model.checkpoint import Checkpoint
from lmserve.model.errors import AdapterError
from lmserve.model.layers.loading import Nowhere
from lmserve.model.linears import Linears
from lmserve.model.ops import Ops
from lmserve.model.tensors import TensorSource


class _Noting(Nowhere):
    """Loads nothing, and notes which linear layers there are."""

    def __init__(self) -> None:
        self.linears: Linears[None] = Linears()

    def load_linear(self, sources: Sequence[TensorSource], bias: Sequence[TensorSource] | None = None) -> None:
        del bias
        self.linears.add(None, sources)


def open_adapter(path: str | Path, checkpoint: Checkpoint, *, max_rank: int) -> Adapter:
    """Read an adapter, and check that it fits a model. Raises AdapterError."""
    check_takes_adapters(checkpoint)
    adapter = read_adapter(path, max_rank=max_rank)
    noting = _Noting()
    checkpoint.load(cast("Ops[Any, Any]", noting))
    if checkpoint.path.is_file():
        adapter = for_gguf(adapter, checkpoint.family, checkpoint.config, noting.linears.modules)
    noting.linears.changes(adapter)
    return adapter


def check_takes_adapters(checkpoint: Checkpoint) -> None:
    """Raises AdapterError for a model that no adapter can change here."""
    if checkpoint.kind != "generate":
        raise AdapterError(f"{checkpoint.name} is an embedding model; adapters need a model that generates")
    if checkpoint.family.by_transformers:
        raise AdapterError(f"{checkpoint.name} runs through transformers; adapters need a model of a supported family")
