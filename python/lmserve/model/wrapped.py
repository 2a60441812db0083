"""Text models inside of others: what of a `*ForConditionalGeneration` checkpoint is the text model's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

T = TypeVar("T")

# What the outer configuration may say for the text model, where that does not say it itself.
INHERITED: Final[tuple[str, ...]] = (
    "quantization_config",
    "tie_word_embeddings",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
)
# Text models that another name stands for, within their wrappers or as wrappers that say everything themselves.
MODEL_TYPES: Final[dict[str, str]] = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_text": "qwen3",
}
# What becomes of the beginnings of its names, in the form that transformers takes; `text_tensors` reads the same names.
TEXT_NAMES: Final[dict[str, str]] = {
    "^model.language_model": "model",
    "^language_model.model": "model",
    "^language_model.lm_head": "lm_head",
}
_TEXT: Final = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)")
# Parts of a name that only what sees or hears has.
_OTHER: Final = re.compile(
    r"(^|[._])(vision|visual|audio|image|video|patch|multi_modal|multimodal|mm|connector|projector|perceiver|sound|speech)([._]|$)"
)


def text_config(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of the text model within `raw`; None: `raw` is no wrapper's."""
    inner = raw.get("text_config")
    if isinstance(inner, dict):
        return {key: raw[key] for key in INHERITED if key in raw} | inner
    if raw.get("model_type") in MODEL_TYPES and isinstance(raw.get("vision_config"), dict):
        return raw | {"architectures": None}
    return None


def text_tensors(tensors: Mapping[str, T]) -> tuple[dict[str, T], int]:
    """The text model's tensors by the names that it has alone, and how many others there were, which see or hear."""
    found: dict[str, T] = {}
    skipped = 0
    for name, tensor in tensors.items():
        match = _TEXT.fullmatch(name)
        if match is not None:
            stem = match[1]
            found[stem if stem.startswith("lm_head.") else f"model.{stem}"] = tensor
        elif _OTHER.search(name):
            skipped += 1
        else:
            found[name] = tensor
    return found, skipped
