"""`lmserve chat` against a real server: through a pipe, and in a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from server_process import ServerProcess

LONG = "Write a very long story about a lighthouse, in great detail."


def test_answers_go_to_stdout(default_server: ServerProcess) -> None:
    command = [sys.executable, "-m", "lmserve", "chat", "--url", default_server.url, "--temperature", "0"]
    line = "What is the capital of Japan?\n"
    done = subprocess.run(command, input=line, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    body = {"prompt": "What is the capital of Japan?", "temperature": 0}
    expected = httpx.post(f"{default_server.url}/generate", json=body, timeout=60).json()["text"]
    assert done.stdout == expected + "\n"


@dataclass
class Terminal:
    """`lmserve chat` behind a pseudo-terminal."""

    process: subprocess.Popen[bytes]
    descriptor: int
    seen: str = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """Read until `pattern` matches what came since the last match; what came up to its end."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            ready, _, _ = select.select([self.descriptor], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{pattern!r} did not come; {self.seen!r} did"
            self.seen += os.read(self.descriptor, 65536).decode(errors="replace")
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before


@pytest.fixture
def terminal(default_server: ServerProcess) -> Iterator[Terminal]:
    # Who runs the tests in the background may ignore Ctrl-C, and what they start would, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lmserve", "chat", "--url", default_server.url, "--max-tokens", "128"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=os.environ | {"TERM": "dumb"}
    )
    os.close(theirs)
    signal.signal(signal.SIGINT, before)
    yield Terminal(process, ours)
    process.kill()
    process.wait()
    os.close(ours)


def test_ctrl_c_cancels_the_answer_and_keeps_the_conversation(terminal: Terminal) -> None:
    terminal.wait_for(r"SmolLM2-135M-Instruct at .*> ")
    terminal.type(LONG + "\n")
    terminal.wait_for(re.escape(LONG) + r"\r\n.*\w+ \w+")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for(r"\[cancelled\]\r\n.*> ")
    terminal.type("Say hello.\n")
    terminal.wait_for(r"Say hello\.\r\n.*\w+.*\r\n.*> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_ctrl_c_at_the_prompt_starts_a_new_line(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    # The prompt is there a moment before readline waits for a key.
    time.sleep(0.5)
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for(r"\r\n.*> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
