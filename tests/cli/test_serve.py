"""`lmserve serve` as a process: what it prints, how it fails, how it stops."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from lmserve.cli import main
from server_process import ServerProcess, serving


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`failure(ARGUMENTS)`: the one line that `lmserve serve ARGUMENTS` fails with."""

    def run(*arguments: str) -> str:
        assert main(["serve", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    return run


def test_it_says_what_it_serves(default_server: ServerProcess) -> None:
    lines = default_server.output().splitlines()
    assert lines[0].startswith("Model     SmolLM2-135M-Instruct (also as internlm-chat-7b), from ")
    assert lines[0].endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert "context 8192 tokens" in lines[1]
    assert lines[2].startswith("Weights   ")
    assert lines[3].startswith("Sampling  ")
    assert "blocks of" in lines[4]
    assert lines[5].startswith("Sessions  ")
    assert lines[5].endswith(" fit into the KV cache")
    assert lines[6] == "Drafts    up to 8 tokens of a sequence, 64 sampled rows a step with them"
    assert lines[7] == f"API       {default_server.url}"
    assert lines[8] == f"Docs      {default_server.url}/docs"
    assert httpx.get(f"{default_server.url}/docs").status_code == 200


def test_nothing_but_a_line_for_each_request_is_written_while_it_serves(default_server: ServerProcess) -> None:
    """A library's warning there would be one that users see, too."""
    request = {"model": "SmolLM2-135M-Instruct", "input": "Hello"}
    assert httpx.post(f"{default_server.url}/v1/embeddings", json=request, timeout=60).status_code == 200

    def written() -> list[str]:
        return default_server.output().partition("Ready after")[2].splitlines()[1:]

    def is_logged() -> bool:
        return any(" INFO lmserve.requests: POST /v1/embeddings 200 " in line and " in=" in line for line in written())

    # A request's line comes after its reply.
    deadline = time.monotonic() + 60
    while not is_logged():
        assert time.monotonic() < deadline, written()
        time.sleep(0.01)
    assert all(" INFO lmserve.requests: " in line for line in written())


def test_embedding_model_with_keys_and_ctrl_c(minilm_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("file-key\n")
    arguments = [str(minilm_folder), "--served-model-name", "minilm", "--cors-origin", "https://app.example"]
    arguments += ["--api-key", "flag-key", "--api-key-file", str(keys)]
    with serving(tmp_path, *arguments) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        for key in ("flag-key", "file-key"):
            reply = httpx.post(
                f"{server.url}/v1/embeddings",
                json={"model": "minilm", "input": ["A cat sits.", "A feline is sitting.", "Stocks fell."]},
                headers={"Authorization": f"Bearer {key}", "Origin": "https://app.example"},
                timeout=60,
            )
            assert reply.status_code == 200, reply.text
            assert reply.headers["access-control-allow-origin"] == "https://app.example"
        first, second, third = (item["embedding"] for item in reply.json()["data"])
        assert dot(first, second) > dot(first, third) + 0.3

        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.output()
        assert "flag-key" not in server.output()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the pages of a cut file may stay")
def test_a_server_whose_mapped_weights_are_cut_says_why_it_ends(smollm2_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    arguments = [str(smollm2_gguf), "--weights-cache", str(folder)]
    with serving(tmp_path, *arguments):
        deadline = time.monotonic() + 60
        while not (written := [path for path in folder.glob("*") if path.suffix != ".part"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with serving(tmp_path, *arguments) as server:
        assert f"mapped from {written[0]}" in server.output()
        written[0].write_bytes(b"")
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hello"}, timeout=60)
        assert server.process.wait(30) == -signal.SIGBUS
        assert "the server ends by SIGBUS: a file that it has mapped was cut" in server.output()


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_port_in_use(minilm_folder: Path, failure: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in failure(str(minilm_folder), "127.0.0.1", str(port))


def test_address_of_another_machine(minilm_folder: Path, failure: Callable[..., str]) -> None:
    assert "the server cannot listen on 192.0.2.1:8000" in failure(str(minilm_folder), "192.0.2.1", "8000")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("model.gguf", b"not a model", "is not a GGUF file"),
        ("model.gguf", b"GGUF\3\0", "model.gguf"),
        ("folder", None, "config.json"),
    ],
)
def test_model_that_is_none(
    tmp_path: Path, name: str, content: bytes | None, expected: str, failure: Callable[..., str]
) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert expected in failure(str(path))


def test_setting_that_the_model_cannot_have(smollm2_gguf: Path, failure: Callable[..., str]) -> None:
    assert "max_model_len is 100000; this model takes 1 to 8192 tokens" in failure(
        str(smollm2_gguf), "--max-model-len", "100000"
    )


def test_interrupted_while_it_loads(smollm2_gguf: Path) -> None:
    command = [sys.executable, "-m", "lmserve", "serve", str(smollm2_gguf), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Loading"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors
