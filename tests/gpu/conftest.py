"""Skips these tests, with the reason, where torch sees no GPU; and lets them use the helpers of tests/engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        reason = f"needs a CUDA GPU; this torch ({torch.__version__}) sees none here"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
