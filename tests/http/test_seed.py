"""The seed document's own client and commands, unchanged."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

SEED = Path(__file__).with_name("seed.zh.md").read_text("utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", SEED, re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", SEED, re.DOTALL)


def run_example(url: str) -> str:
    """Run the document's Python example against `url`; its output."""
    host, port = url.removeprefix("http://").split(":")
    source = EXAMPLE.replace("{server_name}", host).replace("{server_port}", port)
    printed: list[str] = []

    def collect(*words: object, end: str = "\n", **_: object) -> None:
        printed.append(" ".join(map(str, words)) + end)

    exec(compile(source, "example.py", "exec"), {"print": collect})  # the document's words, not a stranger's
    return "".join(printed)


def curl(url: str, command: str) -> Any:
    """Run one of the document's commands against `url`; its reply."""
    host, port = url.removeprefix("http://").split(":")
    text = command.replace("{server_name}", host).replace("{server_port}", port).replace("\\\n", " ")
    words = shlex.split(text)
    done = subprocess.run([*words, "-sS", "--fail-with-body"], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def test_python_example(url: str) -> None:
    text = run_example(url)
    assert len(text) > 10


def test_there_are_four_commands() -> None:
    assert len(COMMANDS) == 4
    assert [command.split()[1].rsplit("}", 1)[1] for command in COMMANDS] == [
        "/v1/models",
        "/generate",
        "/v1/chat/completions",
        "/v1/embeddings",
    ]


def test_curl_models(url: str) -> None:
    reply = curl(url, COMMANDS[0])
    assert reply["object"] == "list"
    assert "internlm-chat-7b" in [model["id"] for model in reply["data"]]


def test_curl_generate(url: str) -> None:
    reply = curl(url, COMMANDS[1])
    assert reply["text"]
    assert reply["tokens"] == reply["usage"]["completion_tokens"] > 0
    assert reply["finish_reason"] in ("stop", "length")


def test_curl_chat(url: str) -> None:
    reply = curl(url, COMMANDS[2])
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "internlm-chat-7b"
    assert reply["choices"][0]["message"]["content"]


def test_curl_embeddings(url: str) -> None:
    reply = curl(url, COMMANDS[3])
    vector = reply["data"][0]["embedding"]
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-4)
