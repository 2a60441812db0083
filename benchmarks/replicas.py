"""Several servers that share their sessions, behind nginx: one is killed and one is added while sessions go on.

    .venv/bin/python benchmarks/replicas.py [--replicas 3] [--sessions 200] [--turns 6] [--model PATH] [--memory 256MiB]

The sessions are run twice: with affinity, by docs/deploy/replicas.conf, and without, each request to the next server.
Counted are turns that were told and are not there, or are there twice; and from a session's second turn on, how much of
its history came from the KV cache. It needs nginx and PostgreSQL (--store URL: a database that is there already).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs/deploy/replicas.conf"
STARTING = 300.0  # seconds
PATIENCE = 120.0  # of a client that tries a turn again
COUNTERS = ("writes", "written_bytes", "loads", "loaded_bytes")
LINE = r"^lmserve_session_store_{}_total(?:{{[^}}]*}})? (\d+)$"
STORE = {name: re.compile(LINE.format(name), re.MULTILINE) for name in COUNTERS}


@dataclass
class Replica:
    """One of the servers."""

    process: subprocess.Popen[bytes]
    url: str

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    def counters(self) -> dict[str, int]:
        """What it has asked of the store."""
        page = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = {name: pattern.search(page) for name, pattern in STORE.items()}
        return {name: int(match[1]) for name, match in found.items() if match is not None}


@dataclass
class Counts:
    """What the clients have seen."""

    turns: int = 0  # whose reply came
    tried_again: int = 0
    history_tokens: int = 0  # of turns after the first
    cached_tokens: int = 0
    later_turns: int = 0
    hits: int = 0  # of these, that found all but the last block of their history
    lost: int = 0
    doubled: int = 0
    seconds: float = 0
    tokens: int = 0  # of all sessions at the end
    writes: int = 0
    written_bytes: int = 0
    loads: int = 0
    loaded_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def started(folder: Path, number: int, arguments: list[str]) -> Replica:
    log = folder / f"replica-{number}"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "lmserve", "serve", *arguments, "--port", "0"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + STARTING
    while True:
        printed = log.read_text("utf-8")
        url = re.search(r"^API +(http://\S+)$", printed, re.MULTILINE)
        if url and re.search("^Ready", printed, re.MULTILINE):
            return Replica(process, url[1])
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the server did not start:\n{printed}")
        time.sleep(0.05)


class Proxy:
    """nginx in front of the servers."""

    def __init__(self, folder: Path, port: int, *, affinity: bool) -> None:
        found = shutil.which("nginx")
        if found is None:
            raise RuntimeError("nginx was not found")
        self.url = f"http://127.0.0.1:{port}"
        self._folder, self._port, self._affinity = folder, port, affinity
        self._command = [found, "-p", str(folder), "-c", "nginx.conf", "-e", "nginx-errors"]
        self._process: subprocess.Popen[bytes] | None = None

    def serve(self, addresses: list[str]) -> None:
        """Let it know these servers and no others."""
        site = SITE.read_text("utf-8").replace("listen 8080", f"listen 127.0.0.1:{self._port}")
        servers = "".join(f"    server {address} max_fails=1 fail_timeout=5s;\n" for address in addresses)
        site = re.sub(r"(    server 10\.0\.0\.\d+:\d+ .*\n)+", servers, site)
        if not self._affinity:
            site = site.replace("    hash $affinity consistent;\n", "")
        paths = "".join(f"{name}_temp_path {name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        head = "daemon off;\npid nginx.pid;\nworker_processes 1;\nevents {}\nhttp {\naccess_log off;\n"
        (self._folder / "nginx.conf").write_text(f"{head}{paths}{site}}}\n", "utf-8")
        if self._process is None:
            self._process = subprocess.Popen(self._command)
            return
        subprocess.run([*self._command, "-s", "reload"], check=True)

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


class Clients:
    """Sessions that go on, each one turn after the other."""

    def __init__(self, url: str, options: argparse.Namespace, name: str) -> None:
        self.counts = Counts()
        self._url, self._options, self._name = url, options, name
        self._lock = threading.Lock()
        self._waiting: Queue[tuple[int, int]] = Queue()
        self._open = options.sessions * options.turns

    def run(self) -> threading.Thread:
        """All sessions, on a thread of its own."""

        def work() -> None:
            begun = time.monotonic()
            for session in range(self._options.sessions):
                self._waiting.put((session, 0))
            threads = [threading.Thread(target=self._client) for _ in range(self._options.clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.counts.seconds = time.monotonic() - begun

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def check(self) -> None:
        """Compare what the clients were told with what is there."""
        with httpx.Client(base_url=self._url, timeout=60) as client:
            for session in range(self._options.sessions):
                reply = client.get(f"/v1/sessions/{self._id(session)}/transcript", params={"token_ids": True})
                turns = reply.json()["turns"] if reply.status_code == 200 else []
                self.counts.tokens += sum(len(turn["input_ids"]) + len(turn["output_ids"]) for turn in turns)
                for turn in range(self._options.turns):
                    found = sum(_prompt(session, turn) in said["input"] for said in turns)
                    self.counts.lost += found == 0
                    self.counts.doubled += found > 1

    def _id(self, session: int) -> str:
        return f"{self._name}-{session}"

    def _client(self) -> None:
        with httpx.Client(base_url=self._url, timeout=600) as client:
            while True:
                with self._lock:
                    if self._open == 0:
                        return
                try:
                    session, turn = self._waiting.get(timeout=0.1)
                except Empty:
                    continue
                self._turn(client, session, turn)
                with self._lock:
                    self._open -= 1
                if turn + 1 < self._options.turns:
                    self._waiting.put((session, turn + 1))

    def _turn(self, client: httpx.Client, session: int, turn: int) -> None:
        body = {"prompt": _prompt(session, turn), "create": True, "ignore_eos": True, "temperature": 0.0}
        body["max_tokens"] = self._options.answer
        deadline = time.monotonic() + PATIENCE
        while True:
            why = ""
            try:
                reply = client.post(f"/v1/sessions/{self._id(session)}/turns", json=body)
                if reply.status_code == 200:
                    self._count(turn, reply.json()["usage"])
                    return
                why = f"{reply.status_code} {reply.text[:200]}"
                # A turn whose reply was lost may be there.
                card = client.get(f"/v1/sessions/{self._id(session)}")
                if card.status_code == 200 and card.json()["turns"] > turn:
                    return
            except httpx.TransportError as error:
                why = repr(error)
            with self._lock:
                self.counts.tried_again += 1
            if time.monotonic() > deadline:
                with self._lock:
                    self.counts.problems.append(f"session {session}, turn {turn}: {why}")
                return
            time.sleep(0.2)

    def _count(self, turn: int, usage: dict[str, Any]) -> None:
        with self._lock:
            counts = self.counts
            counts.turns += 1
            if turn > 0:
                counts.later_turns += 1
                counts.history_tokens += usage["history_tokens"]
                counts.cached_tokens += min(usage["cached_tokens"], usage["history_tokens"])
                counts.hits += usage["cached_tokens"] >= usage["history_tokens"] - 16


def _prompt(session: int, turn: int) -> str:
    return f"This is turn {turn} of session {session}; name a colour."


def run(options: argparse.Namespace, store: str, folder: Path, *, affinity: bool) -> Counts:
    """The sessions once."""
    name = "affinity" if affinity else "any"
    arguments = [] if options.model is None else [str(options.model)]
    arguments += ["--session-store", store, "--kv-memory", options.memory, "--threads", str(options.threads)]
    arguments += ["--max-model-len", str(options.context), "--request-log", "off"]
    replicas: list[Replica] = []
    proxy = Proxy(folder, options.port, affinity=affinity)
    try:
        replicas.extend(started(folder, number, arguments) for number in range(options.replicas))
        proxy.serve([replica.address for replica in replicas])
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{proxy.url}/health").status_code == 200:
                    break
            time.sleep(0.05)
        clients = Clients(proxy.url, options, f"{name}-{time.time_ns()}")
        running, all_turns = clients.run(), options.sessions * options.turns
        _wait(running, clients, all_turns / 3)
        before = replicas[0].counters()
        replicas[0].process.send_signal(signal.SIGKILL)
        _wait(running, clients, all_turns * 2 / 3)
        replicas.append(started(folder, options.replicas, arguments))
        proxy.serve([replica.address for replica in replicas])
        running.join()
        clients.check()
        for counted in (before, *(replica.counters() for replica in replicas[1:])):
            for counter, value in counted.items():
                setattr(clients.counts, counter, getattr(clients.counts, counter) + value)
        return clients.counts
    finally:
        proxy.close()
        for replica in replicas:
            replica.process.kill()
            replica.process.wait()


def _wait(running: threading.Thread, clients: Clients, turns: float) -> None:
    while running.is_alive() and clients.counts.turns < turns:
        time.sleep(0.02)


@contextlib.contextmanager
def database(given: str | None) -> Iterator[str]:
    """The URL of a database."""
    if given is not None:
        yield given
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from postgres import database as own

    with own() as postgres:
        yield postgres.url


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--memory", default="256MiB", help="--kv-memory of a server")
    parser.add_argument("--threads", type=int, default=1, help="of a server")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--port", type=int, default=23380, help="of nginx")
    parser.add_argument("--store", metavar="URL", help="a PostgreSQL database; absent: one is started")
    parser.add_argument("--json", type=Path, help="write the counts there")
    options = parser.parse_args()
    result = {}
    with database(options.store) as store, tempfile.TemporaryDirectory() as name:
        for affinity in (True, False):
            counts = run(options, store, Path(name), affinity=affinity)
            result["affinity" if affinity else "any"] = asdict(counts)
            print("with affinity" if affinity else "without", report(counts), *counts.problems, sep="\n", flush=True)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"options": {**vars(options), "model": str(options.model), "json": None}, **result}, indent=1)
        )
    return int(any(counts["lost"] or counts["doubled"] or counts["problems"] for counts in result.values()))


def report(counts: Counts) -> str:
    cached = counts.cached_tokens / max(counts.history_tokens, 1)
    hits = counts.hits / max(counts.later_turns, 1)
    per_turn = counts.written_bytes / max(counts.writes, 1)
    return (
        f"  turns told: {counts.turns}, lost: {counts.lost}, twice: {counts.doubled}, "
        f"tried again: {counts.tried_again}\n"
        f"  of the history from turn 2 on, cached: {cached:.1%}; turns that found theirs: {hits:.1%}\n"
        f"  {counts.seconds:.1f} s; store: {counts.writes} writes of {per_turn:.0f} bytes, {counts.loads} loads"
    )


if __name__ == "__main__":
    sys.exit(main())
