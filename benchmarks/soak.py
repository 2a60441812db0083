"""A soak: `lmserve serve` under a mixed load for minutes, with clients that leave, and what it holds meanwhile.

It starts the server, prints a row for each moment, and ends with exit code 1 if the server refused or failed a request
that it should have served, or still holds something of the requests when all of them have ended.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import httpx

SHARES: Final = (0.0, 0.2, 0.5, 1.0)  # of the time, at which a row is printed
SESSIONS: Final = 48
WORDS: Final = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "boil",
)
# The KV cache is full soon, so that what grows after that is something else.
SERVE: Final = ("--kv-memory", "256MiB")
STARTING: Final = 300.0  # seconds
ENDING: Final = 30.0  # seconds for the server to let go of everything
COLUMNS: Final = "{:>7} {:>9} {:>5} {:>6} {:>7} {:>7} {:>7} {:>9} {:>8} {:>8}"


@dataclass
class Load:
    """What the clients have done."""

    drop: float
    rng: random.Random
    done: int = 0
    dropped: int = 0
    wrong: Counter[str] = field(default_factory=Counter)

    def text(self, most: int) -> str:
        return " ".join(self.rng.choices(WORDS, k=self.rng.randint(1, most)))


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server on a free port, once its model is loaded, and its address."""
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "lmserve", "serve", "--port", "0", "--request-log", "off", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process, _wait_until_ready(process, output)
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], output: IO[bytes]) -> str:
    deadline = time.monotonic() + STARTING
    while process.poll() is None and time.monotonic() < deadline:
        output.seek(0)
        printed = output.read().decode()
        if (url := re.search(r"^API +(http://\S+)$", printed, re.MULTILINE)) and "Ready after" in printed:
            return url[1]
        time.sleep(0.2)
    output.seek(0)
    sys.exit(f"the server did not start:\n{output.read().decode()}")


def request_of(load: Load) -> tuple[str, dict[str, Any]]:
    """A route and a body: chats, completions, turns of sessions, embeddings, and the tokenizer alone."""
    rng = load.rng
    stream = rng.random() < 0.7
    length = rng.randint(4, 96)
    kind = rng.random()
    if kind < 0.3:
        messages = [{"role": "user", "content": load.text(120)}]
        return "/v1/chat/completions", {"messages": messages, "max_tokens": length, "stream": stream}
    if kind < 0.55:
        body = {"prompt": load.text(300), "max_tokens": length, "stream": stream, "n": rng.choice((1, 1, 2))}
        return "/v1/completions", body
    if kind < 0.85:
        turn = {"prompt": load.text(40), "instance_id": rng.randrange(SESSIONS), "request_output_len": length}
        # Begun anew now and then: the context is no longer than it is.
        return "/generate", turn | {"sequence_start": rng.random() < 0.3, "stream": stream}
    if kind < 0.95:
        return "/v1/embeddings", {"input": [load.text(60) for _ in range(rng.randint(1, 4))]}
    return "/tokenize", {"prompt": load.text(400)}


async def client(http: httpx.AsyncClient, load: Load, until: float) -> None:
    """One client, which sends a request after the other, and leaves some of them."""
    while time.monotonic() < until:
        path, body = request_of(load)
        leaves = body.get("stream", False) and load.rng.random() < load.drop / 0.6
        try:
            async with http.stream("POST", path, json=body) as reply:
                left = load.rng.randint(0, 4) if leaves else None
                async for _ in reply.aiter_bytes():
                    if left == 0:
                        break
                    left = None if left is None else left - 1
                if left == 0:
                    load.dropped += 1
                elif not expected(path, reply.status_code):
                    load.wrong[f"{path} {reply.status_code}"] += 1
        except httpx.HTTPError as error:
            load.wrong[f"{path} {type(error).__name__}"] += 1
        load.done += 1


def expected(path: str, status: int) -> bool:
    """A turn may meet a session that is not there, that runs, or whose context is full."""
    return status == 200 or (path == "/generate" and status in (400, 404, 409))


def held(process: subprocess.Popen[bytes], url: str) -> dict[str, int]:
    """What the server holds: memory in MB, descriptors, open requests, and KV blocks."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    [rss] = re.findall(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    metrics = httpx.get(f"{url}/metrics", timeout=60).text
    found = {"rss": int(rss) // 1000, "fds": sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir())}
    [open_requests] = re.findall(r"^lmserve_requests_open\S* (\d+)$", metrics, re.MULTILINE)
    found["open"] = int(open_requests)
    for state in ("owned", "cached", "free"):
        [blocks] = re.findall(rf'^lmserve_kv_blocks\S*state="{state}"\S* (\d+)$', metrics, re.MULTILINE)
        found[state] = int(blocks)
    [panics] = re.findall(r"^lmserve_panics_total\S* (\d+)$", metrics, re.MULTILINE)
    return found | {"panics": int(panics)}


async def run(process: subprocess.Popen[bytes], url: str, options: argparse.Namespace) -> int:
    load = Load(options.drop, random.Random(options.seed))  # noqa: S311 - it chooses requests
    seconds = options.minutes * 60
    began = time.monotonic()
    names = ("minute", "RSS (MB)", "fds", "open", "owned", "cached", "free", "requests", "dropped", "wrong")
    print(COLUMNS.format(*names))

    async def show(moment: str) -> dict[str, int]:
        now = await asyncio.to_thread(held, process, url)
        names = ("rss", "fds", "open", "owned", "cached", "free")
        counts = (load.done, load.dropped, load.wrong.total())
        print(COLUMNS.format(moment, *(now[name] for name in names), *counts), flush=True)
        return now

    await show("0")
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        clients = [asyncio.create_task(client(http, load, began + seconds)) for _ in range(options.clients)]
        for share in SHARES[1:]:
            await asyncio.sleep(max(began + seconds * share - time.monotonic(), 0))
            await show(f"{options.minutes * share:g}")
        await asyncio.gather(*clients)
    deadline = time.monotonic() + ENDING
    last = await asyncio.to_thread(held, process, url)
    while (last["open"] or last["owned"]) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
        last = await asyncio.to_thread(held, process, url)
    last = await show("idle")
    for what, count in load.wrong.most_common():
        print(f"wrong: {what}, {count} times")
    return int(bool(load.wrong or last["open"] or last["owned"] or last["panics"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    parser.add_argument("--clients", type=int, default=8, help="that send at a time (default: 8)")
    parser.add_argument("--drop", type=float, default=0.2, help="share of requests that are left (default: 0.2)")
    parser.add_argument("--seed", type=int, default=1, help="of the requests (default: 1)")
    parser.add_argument("serve", nargs="*", help=f"arguments of lmserve serve, after -- (default: {' '.join(SERVE)})")
    options = parser.parse_args()
    with serving(options.serve or SERVE) as (process, url):
        return asyncio.run(run(process, url, options))


if __name__ == "__main__":
    sys.exit(main())
