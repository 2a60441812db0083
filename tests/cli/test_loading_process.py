"""A model that never ends loading: signals are obeyed, each part has a limit, and a line says which part it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# `lmserve` with a part of the loading that never ends. It begins with a line on stdout.
SCRIPT = """
import os, sys, threading
from lmserve import loading
from lmserve.cli import main
from lmserve.engine import load
from lmserve.model import checkpoint, files, hf_source

def never_ends(*args, **kwargs):
    # At once: other threads print, too.
    os.write(1, b"\\nnever ends\\n")
    if {busy}:
        while True:
            pass
    threading.Event().wait()

loading.MAX_SECONDS = {seconds}
{patch}
sys.exit(main(sys.argv[1:]))
"""
PARTS = {
    "the configuration": "files.read_json = never_ends",
    "the headers of the weights": "checkpoint._read_weights = never_ends",
    "the tokenizer": "checkpoint.Checkpoint.tokenizer = never_ends",
    "the chat template": "load._core.ChatTemplate = never_ends",
}
WEIGHTS = "load.load_runner = never_ends"


@contextmanager
def loading(
    command: str, model: Path, patch: str, *, seconds: float = 3600, busy: bool = False
) -> Iterator[subprocess.Popen[str]]:
    script = SCRIPT.format(patch=patch, seconds=seconds, busy=busy)
    words = [sys.executable, "-c", script, command, str(model), *(["--port", "0"] if command == "serve" else [])]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for printed in process.stdout:
        if printed.startswith(line):
            return
    pytest.fail(f"it ended:\n{process.communicate()[1]}")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("part", ["the configuration", "the tokenizer", "weights"])
def test_signals_are_obeyed_whatever_is_loaded(minilm_folder: Path, part: str, how: signal.Signals) -> None:
    with loading("serve", minilm_folder, PARTS.get(part, WEIGHTS), busy=how == signal.SIGTERM) as process:
        wait_for(process, "never ends")
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "Fatal" not in errors


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_never_ends_is_named(minilm_folder: Path, part: str, tmp_path: Path) -> None:
    model = with_template(minilm_folder, tmp_path)
    with loading("serve", model, PARTS[part], seconds=0.5) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    last = errors.splitlines()[-1]
    what = f"{part} {'in' if 'weights' in part else 'of'} {model}"
    assert last == f"lmserve: error: {what} must be read within 0.5 s, but this takes longer"
    assert "Traceback" not in errors


def with_template(folder: Path, copy: Path) -> Path:
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return copy


def test_a_plan_has_the_same_limits(minilm_folder: Path) -> None:
    with loading("plan", minilm_folder, PARTS["the configuration"], seconds=0.5) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines() == [
        f"lmserve: error: the configuration of {minilm_folder} must be read within 0.5 s, but this takes longer"
    ]


def test_a_model_that_is_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    command = [sys.executable, "-m", "lmserve", "serve", str(tmp_path / "model.gguf"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"lmserve: error: {tmp_path / 'model.gguf'} is a FIFO, not a file"]
