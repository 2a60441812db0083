"""Every command in a terminal of 60 and of 120 columns: lines end between words, and progress takes one line."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_standin import hub_standin
from lmserve.cli import parser
from lmserve.cli.completion import commands_of
from server_process import ServerProcess

TMUX = shutil.which("tmux")
pytestmark = pytest.mark.skipif(TMUX is None, reason="needs tmux")


class Terminal:
    """A shell in a tmux session of its own."""

    def __init__(self, folder: Path, columns: int, **environment: str) -> None:
        self._tmux = [str(TMUX), "-S", str(folder / "socket"), "-f", "/dev/null"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        variables = {"PATH": path, "PS1": "$ ", **environment}
        shell = ["env", *(f"{name}={value}" for name, value in variables.items()), "bash", "--norc", "--noprofile"]
        self._run("new-session", "-d", "-x", str(columns), "-y", "50", *shell)
        self._commands = 0
        self.wait(lambda: "$" in self.screen())

    def type(self, text: str) -> None:
        self._run("send-keys", "-l", text)
        self._run("send-keys", "Enter")

    def key(self, name: str) -> None:
        self._run("send-keys", name)

    def screen(self) -> str:
        """Its rows as they are seen."""
        return self._run("capture-pane", "-p")

    def lines(self) -> list[str]:
        """What was printed, a line each: rows that the terminal broke are one again."""
        rows = (row.rstrip() for row in self._run("capture-pane", "-p", "-J").splitlines())
        return [row for row in rows if row]

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.screen()
            time.sleep(0.05)

    def output(self, command: str, status: int = 0) -> list[str]:
        """The lines that a command prints."""
        self._commands += 1
        self.type(f"clear; {command}; echo ended-{self._commands}-$?")
        self.wait(lambda: any(line.startswith(f"ended-{self._commands}-") for line in self.lines()))
        *lines, end = (line for line in self.lines() if line != "$")
        assert end == f"ended-{self._commands}-{status}", lines
        return lines

    def close(self) -> None:
        self._run("kill-server")

    def _run(self, *words: str) -> str:
        return subprocess.run([*self._tmux, *words], check=True, capture_output=True, text=True).stdout


@contextmanager
def opened(folder: Path, columns: int, **environment: str) -> Iterator[Terminal]:
    terminal = Terminal(folder, columns, **environment)
    try:
        yield terminal
    finally:
        terminal.close()


def fits(lines: list[str], columns: int) -> None:
    """No line is longer than the terminal is wide, but for a word that is: a path, or a list of flags."""
    for line in lines:
        if len(line) > columns:
            assert any(len(word) > columns / 2 for word in line.split()), line


@pytest.mark.parametrize("columns", [60, 120])
def test_each_command(columns: int, default_server: ServerProcess, tmp_path: Path, smollm2_gguf: Path) -> None:
    url = default_server.url
    run = {
        "run": [(f"lmserve run {smollm2_gguf} 'What is the capital of Japan?' --temperature 0", 0)],
        "serve": [("lmserve serve qwen3:nope", 1), ("lmserve serve --max-batch nope", 2)],
        "chat": [(f"lmserve chat --url {url} </dev/null", 0), ("lmserve chat --url 127.0.0.1:1", 1)],
        "pull": [("lmserve pull", 0), ("lmserve pull /no/model", 1)],
        "list": [("lmserve list", 0), ("lmserve list --known", 0)],
        "show": [(f"lmserve show {smollm2_gguf}", 0), ("lmserve show", 2)],
        "rm": [("lmserve rm a-model-that-nobody-has-fetched-before-and-nobody-will", 1)],
        "plan": [("lmserve plan", 0)],
        "quantize": [(f"lmserve quantize {tmp_path} {tmp_path / 'out.gguf'}", 1)],
        "doctor": [("lmserve doctor --no-speed", 0)],
        "bench": [
            (f"lmserve bench {url} --workload mixed --concurrency 1 --requests 1", 0),
            ("lmserve bench 127.0.0.1:1", 1),
        ],
        "sessions": [(f"lmserve sessions check {tmp_path}", 1)],
        "simulate": [("lmserve simulate --steps 2000 --seed 1", 0)],
        "replay": [("lmserve replay /no/recording", 1)],
        "completion": [("lmserve completion bash >/dev/null", 0)],
    }
    aliases = {"fetch", "ls"}
    assert run.keys() == commands_of(parser()).keys() - aliases
    with opened(tmp_path, columns) as terminal:
        for commands in run.values():
            for command, status in commands:
                fits(terminal.output(command, status), columns)


@pytest.mark.parametrize("columns", [60, 120])
def test_a_server_starts_and_ends(columns: int, smollm2_gguf: Path, tmp_path: Path) -> None:
    with opened(tmp_path, columns) as terminal:
        terminal.type(f"lmserve serve {smollm2_gguf} --port 0")
        terminal.wait(lambda: "Ready after" in terminal.screen())
        terminal.key("C-c")
        terminal.wait(lambda: terminal.lines()[-1].endswith("$"))
        fits(terminal.lines()[1:], columns)


@pytest.mark.parametrize("columns", [60, 120])
def test_a_download_takes_one_line(columns: int, smollm2_gguf: Path, tmp_path: Path) -> None:
    with hub_standin() as hub:
        hub.files["test/a-repository-with-a-long-name-GGUF"] = {"smol-Q4_1.gguf": smollm2_gguf.read_bytes()}
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
        with opened(tmp_path, columns, **environment) as terminal:
            command = shlex.join(["lmserve", "pull", "hf.co/test/a-repository-with-a-long-name-GGUF"])
            lines = terminal.output(command)
    assert sum("100 %" in line for line in lines) == 1
    assert not any(f"{part} %" in line for line in lines for part in range(1, 100))
    fits(lines, columns)
