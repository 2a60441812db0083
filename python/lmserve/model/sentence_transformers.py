"""Reads what sentence-transformers saves beside a model: pooling, layers after it, prompts and the length of texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lmserve.model.embedding import POOLINGS, DenseLayer, Embedding
from lmserve.model.errors import CheckpointError
from lmserve.model.files import read_json, read_object
from lmserve.model.safetensors_source import read_safetensors

MODULES: Final = "modules.json"
POOLING_FLAGS: Final = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_weightedmean_tokens": "weighted",
}
# By the names of pooling_mode.
POOLING_MODES: Final = {"mean": "mean", "cls": "cls", "lasttoken": "last", "weightedmean": "weighted"}
ACTIVATIONS: Final = {"Identity": "identity", "Tanh": "tanh", "ReLU": "relu", "Sigmoid": "sigmoid", "GELU": "gelu"}


def max_length(folder: Path) -> int | None:
    """Most tokens of a text, special tokens included; None where the files do not say."""
    limit = read_object(folder / "sentence_bert_config.json").get("max_seq_length")
    return int(limit) if limit else None


def read_embedding(folder: Path, config: dict[str, Any]) -> Embedding:
    """What modules.json describes, and the prompts; of `config`, config.json, the lengths that vectors may be cut to.

    Raises CheckpointError for a module or a pooling that is not supported.
    """
    embedding = Embedding(dimensions=_dimensions(config))
    for module in read_json(folder / MODULES) or []:
        kind, path = str(module.get("type", "")).rpartition(".")[2], folder / str(module.get("path", ""))
        if kind == "Pooling":
            embedding = replace(embedding, pooling=_pooling(path / "config.json"))
        elif kind == "Dense":
            embedding = replace(embedding, layers=(*embedding.layers, _dense(path)))
        elif kind not in ("Transformer", "Normalize"):
            supported = "Transformer, Pooling, Dense, Normalize"
            raise CheckpointError(f"{folder}/{MODULES}: module {kind} is not supported ({supported} are)")
    return _with_prompts(folder, embedding)


def _pooling(path: Path) -> str:
    raw = read_object(path)
    if raw.get("include_prompt") is False:
        raise CheckpointError(f"{path}: a pooling that leaves out the prompt is not supported")
    mode = raw.get("pooling_mode")
    modes = [mode] if mode else [key for key, on in raw.items() if key.startswith("pooling_mode") and on is True]
    found = [(POOLING_FLAGS | POOLING_MODES).get(mode, mode) for mode in modes]
    if len(found) != 1 or found[0] not in POOLINGS:
        given = ", ".join(map(str, found)) or "none"
        raise CheckpointError(f"{path}: pooling {given} is not supported ({', '.join(POOLINGS)} are)")
    return str(found[0])


def _dense(folder: Path) -> DenseLayer:
    raw = read_object(folder / "config.json")
    activation = ACTIVATIONS.get(str(raw.get("activation_function", "Tanh")).rpartition(".")[2])
    if activation is None:
        given, supported = raw.get("activation_function"), ", ".join(ACTIVATIONS)
        raise CheckpointError(f"{folder}: activation_function {given!r} is not supported ({supported} are)")
    if raw.get("module_input_name", "sentence_embedding") not in (None, "sentence_embedding"):
        raise CheckpointError(f"{folder}: a dense layer over {raw['module_input_name']} is not supported")
    stored = read_safetensors(folder)
    weight, bias = stored.get("linear.weight"), stored.get("linear.bias")
    if weight is None:
        raise CheckpointError(f"{folder}: tensor linear.weight is missing")
    return DenseLayer(weight, bias, activation)


def check_layers(embedding: Embedding, hidden_size: int) -> None:
    """Raises CheckpointError where a layer does not take what the one before it gives."""
    size = hidden_size
    for layer in embedding.layers:
        shape = layer.weight.shape
        if len(shape) != 2 or shape[1] != size or (layer.bias is not None and layer.bias.shape != shape[:1]):
            raise CheckpointError(f"{layer.weight.name} has shape {list(shape)}, but takes vectors of {size} numbers")
        size = shape[0]


def _dimensions(config: dict[str, Any]) -> tuple[int, ...]:
    given = config.get("matryoshka_dimensions")
    if given:
        return tuple(sorted(int(size) for size in given))
    return (0,) if config.get("is_matryoshka") is True else ()


def _with_prompts(folder: Path, embedding: Embedding) -> Embedding:
    path = folder / "config_sentence_transformers.json"
    raw = read_object(path)
    prompts, default = raw.get("prompts") or {}, raw.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{path}: prompts must be texts by their names")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{path}: default_prompt_name is {default!r}, which is none of prompts")
    return replace(embedding, prompts=prompts, default_prompt=default)
