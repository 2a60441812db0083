"""Skips these tests, with the reason, where torch sees no GPU; and lets them use the helpers of tests/engine.

DEVICE=cpu runs those that do not need what only a GPU has: a dry run, for which Triton interprets (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))


DRY = os.environ.get("DEVICE") == "cpu"


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "dry: runs on the CPU as well, with DEVICE=cpu")


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if DRY else "cuda"


def pytest_collection_modifyitems(items) -> None:
    if DRY:
        for item in items:
            if Path(__file__).parent in item.path.parents and not item.get_closest_marker("dry"):
                item.add_marker(pytest.mark.skip(reason="needs what only a GPU has"))
    elif not torch.cuda.is_available():
        reason = f"needs a CUDA GPU; this torch ({torch.__version__}) sees none here"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
