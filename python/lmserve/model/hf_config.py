"""Reads single values of Hugging Face's config.json."""

from __future__ import annotations

from typing import Any

from lmserve.model.errors import CheckpointError


def required(raw: dict[str, Any], key: str) -> Any:
    """The value of a key that config.json must have."""
    value = raw.get(key)
    if value is None:
        raise CheckpointError(f"config.json has no {key}")
    return value
