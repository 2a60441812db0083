"""A plain install has no torch: it serves on the CPU kernels, and says what to install for the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import transformers

SCRIPT = """
import sys
sys.modules["torch"] = None  # every import of it fails as where it is not installed
from pathlib import Path
from lmserve.errors import LmserveError
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
try:
    runner = load_runner(open_checkpoint(Path(sys.argv[1])), RunnerOptions(device="cpu", ops=sys.argv[2]))
    print(runner.info.can_generate)
except LmserveError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, ops: str) -> str:
    command = [sys.executable, "-c", SCRIPT, str(folder), ops]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_cpu_kernels_need_none(tiny_llama: Path) -> None:
    assert load(tiny_llama, "auto") == "True"


def test_what_needs_torch_says_what_to_install(tiny_llama: Path) -> None:
    message = load(tiny_llama, "torch")
    assert "ops 'torch' on cpu needs torch, which is not installed: pip install 'lmserve[torch]'" in message
