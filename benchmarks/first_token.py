"""From the command to the first token: `lmserve run MODEL QUESTION` beside `llama-server` and curl, in pairs.

    .venv/bin/python benchmarks/first_token.py [--rounds 5] [--model FILE.gguf] [--json FILE]

Both have the same file and question, and begin with nothing running. lmserve is one command. With llama-server, a
script starts it, waits for its /health, and then has curl ask for a streamed answer. Each runs once before it is
measured: the file is in the page cache then, and lmserve's packed weights are written. These first times are printed
apart.
`LLAMA_SERVER` or the PATH names llama-server; `LLAMA_ARGS` adds flags to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from lmserve.assets import SMOLLM2, fetch
from lmserve.cli.chat import DEFAULT_PORT
from peers import STARTING_SECONDS, find

QUESTION: Final = "What is the capital of Japan?"
LONGEST: Final = 16  # tokens of an answer, of which the first counts


def of_lmserve(model: Path) -> float:
    """Seconds from the command to the first character of the answer."""
    command = [sys.executable, "-m", "lmserve", "run", str(model), QUESTION, "--temperature", "0"]
    command += ["--max-tokens", str(LONGEST)]
    started = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        taken = time.monotonic() - started
        process.stdout.read()
    if not first or process.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode} and printed no answer")
    return taken


def of_llama(program: str, model: Path) -> float:
    """Seconds from the start of llama-server to the first piece of the answer that curl prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    port = url.rpartition(":")[2]
    threads = str(len(os.sched_getaffinity(0)))
    command = [program, "-m", str(model), "--port", port, "--no-webui", "-t", threads]
    command += shlex.split(os.environ.get("LLAMA_ARGS", ""))
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait(server, url, log)
            return _ask(url) - started
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + STARTING_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 - the server's own address
                return
        except OSError:  # it does not listen yet, or answers 503 while it loads the model
            time.sleep(0.01)
    log.seek(0)
    raise RuntimeError(f"llama-server did not start:\n{log.read().decode('utf-8', 'replace')[-2000:]}")


def _ask(url: str) -> float:
    """The moment at which curl has printed the first piece of an answer."""
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": True,
        "temperature": 0,
        "max_tokens": LONGEST,
    }
    command = ["curl", "--silent", "--no-buffer", "--fail-with-body", "--header", "Content-Type: application/json"]
    command += ["--data", json.dumps(body), f"{url}/v1/chat/completions"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        for line in curl.stdout:
            if not line.startswith("data: {"):
                continue
            delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
            if delta.get("content"):
                moment = time.monotonic()
                curl.terminate()
                return moment
    raise RuntimeError("llama-server sent no answer")


def in_use(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def table(times: dict[str, list[float]]) -> str:
    """Seconds as Markdown, and the ratio of each pair; more is better for lmserve."""
    lines = ["| seconds to the first token | first run | lowest | median | highest |", "|---|---|---|---|---|"]
    for name, (cold, *warm) in times.items():
        figures = (cold, min(warm), statistics.median(warm), max(warm))
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in figures)} |")
    if len(times) > 1:
        ours, theirs = (warm[1:] for warm in times.values())
        ratios = [their / own for own, their in zip(ours, theirs, strict=True)]
        middle = statistics.median(ratios)
        lines += ["", f"llama-server's time / lmserve's: {middle:.2f}, {min(ratios):.2f} to {max(ratios):.2f}"]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the default model's)")
    parser.add_argument("--json", type=Path, help="write every time there")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, but {arguments.rounds} was given")
    if in_use(DEFAULT_PORT):
        # lmserve run would use it.
        parser.error(f"a server listens on port {DEFAULT_PORT}: stop it first")
    model = arguments.model or fetch(SMOLLM2)
    runs: dict[str, Callable[[], float]] = {"`lmserve run`": lambda: of_lmserve(model)}
    if program := find("LLAMA_SERVER", "llama-server"):
        runs["llama-server and curl"] = lambda: of_llama(program, model)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for at in range(arguments.rounds + 1):
        # Nobody is always first.
        for name in list(runs)[:: 1 if at % 2 else -1]:
            times[name].append(runs[name]())
            print(f"{name:<24} {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(times, indent=2) + "\n", "utf-8")
    print(table(times))


if __name__ == "__main__":
    main()
