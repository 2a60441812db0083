"""Describes models of transformers that have no family of their own, by a pass without weights.

A forward pass on torch's device "meta" computes shapes alone. Each attention layer reports its shape in this
pass, so that the cache is known before any weight is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributions import Distribution
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmserve.model.config import AttentionLayer, ModelConfig, RopeConfig
from lmserve.model.errors import CheckpointError
from lmserve.model.transformers_attention import NAME, attending

TRIED: Final = 3  # tokens of the pass without weights
# What an attention may ask for that changes no number of an inference.
HARMLESS: Final = frozenset({"dropout", "position_ids", "use_cache", "cache_position"})
# Their frequencies follow the longest sequence of a batch: what comes out would depend on the neighbours.
UNSTABLE_ROPES: Final = frozenset({"dynamic", "longrope"})


def describe(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a causal language model with this config.json.

    Raises CheckpointError that names the part that cannot run here.
    """
    config = hf_config(raw)
    _refuse_what_no_pass_shows(config)
    config._attn_implementation = NAME  # noqa: SLF001 - transformers has no other way
    layers = _tried(config)
    count = config.num_hidden_layers
    if not layers or len(layers) % count:
        raise CheckpointError(f"lmserve can find the attention of only {len(layers)} of its {count} layers")
    windows = any(layer.window is not None for layer in layers)
    if getattr(config, "sliding_window", None) is not None and not windows and _slides(config):
        raise CheckpointError("its layers do not pass their sliding window to the attention")
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise CheckpointError("config.json does not say how long a sequence may be (max_position_embeddings)")
    first = layers[0]
    # Of Gemma 3n, one for each layer.
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return ModelConfig(
        architecture=str(config.model_type),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=inner if isinstance(inner, int) else max(inner),
        num_layers=len(layers),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        norm_eps=1e-5,
        rope=RopeConfig(),  # rotated by the model itself
        tie_word_embeddings=False,
        context_length=length,
        attention=layers,
    )


def hf_config(raw: Mapping[str, Any]) -> Any:
    """transformers' own configuration. Raises CheckpointError where it knows no causal model of that type."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"transformers has no causal language model of type {kind!r}")
    known, named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], raw.get("architectures")
    if named and not {known} & set(named):
        raise CheckpointError(f"the causal language model of type {kind!r} is {known}, not {', '.join(named)}")
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(raw))
    except Exception as error:
        raise CheckpointError(f"transformers refuses its config.json: {error}") from error


def _refuse_what_no_pass_shows(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError("it has an encoder beside the decoder")
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention", "dense", "sparse"}:
        raise CheckpointError(f"it has layers of type {min(unknown)}")
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):
        kind = rope.get("rope_type") if isinstance(rope, Mapping) else None
        if kind in UNSTABLE_ROPES:
            raise CheckpointError(f"its rotation ({kind}) depends on the longest sequence of a batch")


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return kinds is None or "sliding_attention" in kinds


def _tried(config: Any) -> tuple[AttentionLayer, ...]:
    layers: list[AttentionLayer] = []

    def attend(_: int, module: Any, query: Tensor, key: Tensor, value: Tensor, asked: dict[str, Any]) -> Tensor:
        layers.append(_layer(module, query, key, value, asked))
        return value.new_empty((1, query.shape[2], query.shape[1], value.shape[-1]))

    try:
        with torch.device("meta"), attending(attend), torch.inference_mode(), _unchecked_distributions():
            make: Any = AutoModelForCausalLM.from_config  # untyped in transformers
            model = make(config, attn_implementation=NAME)
            _check_inputs(model)
            ids = torch.zeros((1, TRIED), dtype=torch.int64)
            positions = torch.arange(TRIED)[None]
            model(input_ids=ids, position_ids=positions, use_cache=False)
    except CheckpointError:
        raise
    except Exception as error:
        # A model of anybody's may fail in any way.
        raise CheckpointError(f"a pass without weights fails: {type(error).__name__}: {error}") from error
    return tuple(layers)


@contextmanager
def _unchecked_distributions() -> Iterator[None]:
    """torch.distributions look at their numbers, of which a pass without weights has none (Gemma 3n's)."""
    before = Distribution._validate_args  # noqa: SLF001 - torch has no other way
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _check_inputs(model: Any) -> None:
    if model._is_stateful:  # noqa: SLF001 - transformers has no other way
        raise CheckpointError("it has layers with a recurrent state")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise CheckpointError("it does not take the positions of its tokens")


def _layer(module: Any, query: Tensor, key: Tensor, value: Tensor, asked: dict[str, Any]) -> AttentionLayer:
    asked = {name: given for name, given in asked.items() if given is not None and name not in HARMLESS}
    asked = {name: given for name, given in asked.items() if not name.startswith("output_")}
    causal = asked.pop("is_causal", getattr(module, "is_causal", True))
    if not causal or query.shape[2] != key.shape[2]:
        raise CheckpointError("it has an attention that is not causal")
    scale, window = asked.pop("scaling", query.shape[-1] ** -0.5), asked.pop("sliding_window", None)
    softcap, sinks = asked.pop("softcap", None), asked.pop("s_aux", None)
    if asked:
        raise CheckpointError(f"its attention asks for {min(asked)}")
    if value.shape[-1] > key.shape[-1]:
        raise CheckpointError("its values are wider than its keys")
    layer = AttentionLayer(
        num_heads=query.shape[1], num_kv_heads=key.shape[1], head_dim=key.shape[-1], scale=float(scale), rope=None
    )
    return replace(
        layer,
        window=None if window is None else int(window),
        softcap=None if softcap is None else float(softcap),
        sinks=sinks is not None,
    )
