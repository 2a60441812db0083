"""`lmserve run`: a model, a server of its own, and an answer, by one command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hub_standin import hub_standin

COMMAND = [sys.executable, "-m", "lmserve", "run"]


def test_one_question_starts_and_ends_a_server(smollm2_gguf: Path) -> None:
    command = [*COMMAND, str(smollm2_gguf), "What is the capital of Japan?", "--temperature", "0"]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "The capital of Japan is Tokyo.\n"
    assert str(smollm2_gguf) not in subprocess.run(["ps", "ax"], capture_output=True, text=True, check=True).stdout


def test_a_model_by_name_is_fetched_and_asked(smollm2_gguf: Path, tmp_path: Path) -> None:
    with hub_standin() as hub:
        hub.files["test/smol-GGUF"] = {"smol-Q4_1.gguf": smollm2_gguf.read_bytes()}
        command = [*COMMAND, "hf.co/test/smol-GGUF", "What is the capital of Japan?", "--temperature", "0"]
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path)}
        done = subprocess.run(
            command, input="", capture_output=True, text=True, timeout=120, check=False, env=environment
        )
    assert (done.returncode, done.stdout) == (0, "The capital of Japan is Tokyo.\n")
    assert "Fetching hf.co/test/smol-GGUF: 100 %" in done.stderr
    assert [path.name for path in tmp_path.rglob("*.gguf")] == ["smol-Q4_1.gguf"]


def test_a_model_that_cannot_be_served_is_one_line() -> None:
    done = subprocess.run(
        [*COMMAND, "/no/model", "Hi"], input="", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("lmserve: error: '/no/model' is not a file or folder here")
    assert done.stderr.count("\n") == 1


def test_nothing_to_ask_is_an_error() -> None:
    done = subprocess.run(COMMAND, input=" \n", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no question" in done.stderr
