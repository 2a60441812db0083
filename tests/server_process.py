"""`lmserve serve` in a process of its own, as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

STARTING_TIMEOUT = 120.0


@dataclass(frozen=True)
class ServerProcess:
    """A server whose model is loaded."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path  # what it printed

    def output(self) -> str:
        return self.log.read_text("utf-8")


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[ServerProcess]:
    """`lmserve serve ARGUMENTS` on a free port, once its model is loaded; its output goes to a file in `folder`."""
    log = folder / "output"
    command = [sys.executable, "-m", "lmserve", "serve", *arguments, "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield ServerProcess(_wait_until_ready(process, log), process, log)
    finally:
        process.kill()
        process.wait()


def children(server: ServerProcess) -> list[int]:
    """The processes that a server has started and that run."""
    found: list[int] = []
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended since
            found += [int(pid) for pid in (task / "children").read_text("ascii").split()]
    return found


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + STARTING_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        printed = log.read_text("utf-8")
        if (url := re.search(r"^API +(http://\S+)$", printed, re.MULTILINE)) and re.search(
            "^Ready", printed, re.MULTILINE
        ):
            return url[1]
        time.sleep(0.05)
    pytest.fail(f"the server did not start:\n{log.read_text('utf-8')}")
