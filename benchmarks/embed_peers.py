"""Texts a second of lmserve and its peers, interleaved: one text at a time, and many in one request.

    .venv/bin/python benchmarks/embed_peers.py [--models NAME,NAME] [--texts 256] [--rounds 3] [--json FILE]

See benchmarks/README.md for the peers and how they are found. Texts have 16 to 400 tokens (MiniLM: 256, its limit).
All processes are there at the same time, but all except the one that is measured are stopped (SIGSTOP). Each round has
texts of its own. The vectors of all are compared: a program that computes something else is no peer.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np
from embed_models import MODELS, EmbeddingModel, gguf_file, model_folder, vocabulary
from gguf import GGMLQuantizationType as Type
from peers import find

Vectors = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Figures = dict[str, dict[str, list[float]]]  # row -> peer -> of each round

STARTING_SECONDS: Final = 600
SHORTEST: Final = 16
# What vectors of the same weights have in common at least: those of eight bits differ more.
COSINE: Final = {"full": 0.999, "Q8_0": 0.98}


@dataclass
class Candidate:
    """A server, or a library in a process of its own. Its ratio is that to others of its precision."""

    name: str
    command: list[str]
    precision: str
    process: subprocess.Popen[bytes]

    def signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def cpu_seconds(self) -> float:
        """Processor time of its processes."""
        ticks = 0
        for folder in Path("/proc").glob("[0-9]*"):
            # Processes come and go while they are listed.
            with contextlib.suppress(OSError):
                if os.getpgid(int(folder.name)) == self.process.pid:
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def wait(self) -> None:
        """Until it embeds. Raises RuntimeError if it does not."""
        raise NotImplementedError

    def embed(self, texts: list[str]) -> Vectors:
        """Unit vectors. Raises RuntimeError if there are none."""
        raise NotImplementedError


@dataclass
class Served(Candidate):
    """One with OpenAI's route."""

    port: int = 0
    connection: http.client.HTTPConnection | None = None

    def signal(self, number: signal.Signals) -> None:
        # It may close what was idle while it was stopped.
        self.connection = None
        super().signal(number)

    def wait(self) -> None:
        started = time.monotonic()
        while True:
            with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
                self.embed(["hello"])
                return
            if self.process.poll() is not None or time.monotonic() - started > STARTING_SECONDS:
                raise RuntimeError(f"{self.name} did not start: {' '.join(self.command)}")
            self.connection = None
            time.sleep(0.1)

    def embed(self, texts: list[str]) -> Vectors:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        body = json.dumps({"model": "model", "input": texts, "encoding_format": "base64"})
        self.connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        reply = self.connection.getresponse()
        answer = reply.read()
        if reply.status != 200:
            raise RuntimeError(f"{self.name}: {reply.status} {answer[:300]!r}")
        return decoded([item["embedding"] for item in json.loads(answer)["data"]])


@dataclass
class Library(Candidate):
    """One in a process that reads lines and writes lines."""

    def wait(self) -> None:
        if self._pipe("stdout").readline() != b"ready\n":
            raise RuntimeError(f"{self.name} did not start: {' '.join(self.command)}")

    def embed(self, texts: list[str]) -> Vectors:
        writing = self._pipe("stdin")
        writing.write(json.dumps(texts).encode() + b"\n")
        writing.flush()
        answer = self._pipe("stdout").readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended: {' '.join(self.command)}")
        return decoded(json.loads(answer))

    def _pipe(self, name: str) -> IO[bytes]:
        pipe: IO[bytes] = getattr(self.process, name)
        return pipe


def decoded(vectors: Sequence[str]) -> Vectors:
    rows = np.stack([np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors])
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def start(model: EmbeddingModel, cache: Path, wanted: set[str]) -> list[Candidate]:
    """Those that are wanted and found, running; lmserve with the publisher's files first."""
    folder, threads = model_folder(model, cache), str(len(os.sched_getaffinity(0)))
    found: list[Candidate] = []

    def begin(kind: type[Candidate], name: str, command: list[str], precision: str = "full") -> None:
        if wanted and name not in wanted:
            return
        port = free_port()
        command = [part.replace("{port}", str(port)) for part in command]
        log = (Path(tempfile.gettempdir()) / f"embed-peers-{name.replace(' ', '-')}.log").open("wb")
        pipe = subprocess.PIPE if kind is Library else log
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if kind is Library else subprocess.DEVNULL,
            stdout=pipe,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        more = {"port": port} if kind is Served else {}
        found.append(kind(name, command, precision, process, **more))
        found[-1].wait()
        found[-1].signal(signal.SIGSTOP)

    try:
        eight_bits = gguf_file(model, folder, cache, Type.Q8_0)
        own = [sys.executable, "-m", "lmserve", "serve", "--port", "{port}", "--served-model-name", "model"]
        begin(Served, "lmserve", [*own, str(folder)])
        begin(Served, "lmserve Q8_0", [*own, str(eight_bits)], "Q8_0")
        if server := find("LLAMA_SERVER", "llama-server"):
            for kind, precision in ((Type.F16, "full"), (Type.Q8_0, "Q8_0")):
                file = gguf_file(model, folder, cache, kind)
                command = [server, "-m", str(file), "--port", "{port}", "--embedding", "-t", threads, "--no-webui"]
                # As many tokens at once as were fastest, a slot for each of several texts, and no cache of prompts.
                command += ["-b", "2048", "-ub", "2048", "-np", "8", "-c", "4096", "--cache-ram", "0"]
                begin(Served, f"llama-server {kind.name}", command, precision)
        if python := os.environ.get("EMBED_PYTHON"):
            worker = str(Path(__file__).with_name("embed_worker.py"))
            for library in ("onnxruntime", "sentence-transformers"):
                begin(Library, library, [python, worker, library, str(folder), model.pooling, threads])
    except BaseException:
        for candidate in found:
            candidate.end()
        raise
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def texts_of(count: int, longest: int, words: list[str], seed: int) -> list[str]:
    """Texts of SHORTEST to `longest` tokens, two of which are special."""
    random = np.random.default_rng(seed)
    lengths = random.integers(SHORTEST - 2, longest - 1, count)
    return [" ".join(random.choice(words, length)) for length in lengths]


def measure(candidates: list[Candidate], model: EmbeddingModel, words: list[str], given: argparse.Namespace) -> Figures:
    """Texts a second, of each round."""
    figures: Figures = {}
    singles = min(given.texts, given.singles)
    for at in range(given.rounds):
        texts = texts_of(given.texts, model.longest, words, given.seed + at)
        seen: dict[str, Vectors] = {}
        # Nobody is always first.
        for candidate in (*candidates[at % len(candidates) :], *candidates[: at % len(candidates)]):
            candidate.signal(signal.SIGCONT)
            candidate.embed(texts_of(2, model.longest, words, given.seed - 1 - at))
            clock = candidate.cpu_seconds if given.cpu_time else time.perf_counter
            started = clock()
            for text in texts[:singles]:
                candidate.embed([text])
            single = singles / (clock() - started)
            started = clock()
            seen[candidate.name] = candidate.embed(texts)
            many = len(texts) / (clock() - started)
            candidate.signal(signal.SIGSTOP)
            for row, value in (("one at a time", single), (f"{len(texts)} at once", many)):
                figures.setdefault(f"{model.name}, {row}", {}).setdefault(candidate.name, []).append(value)
            print(f"{model.name:<22} {candidate.name:<22} {single:8.2f} {many:8.2f} texts/s", file=sys.stderr)
        compare(candidates, seen)
    return figures


def compare(candidates: list[Candidate], seen: dict[str, Vectors]) -> None:
    """Raises RuntimeError where vectors are not those of the first."""
    first = seen[candidates[0].name]
    for candidate in candidates[1:]:
        cosines = (seen[candidate.name] * first).sum(-1)
        print(f"{candidate.name}: cosines of {cosines.min():.6f} and more", file=sys.stderr)
        if cosines.min() < COSINE[candidate.precision]:
            raise RuntimeError(f"{candidate.name} computes something else: a cosine is {cosines.min()}")


def table(figures: Figures, precisions: dict[str, str]) -> str:
    """Medians, and for each precision the ratio of lmserve to the best peer of its round."""
    names = list(precisions)
    kinds = list(dict.fromkeys(precisions.values()))
    lines = [f"| texts/s | {' | '.join(names)} | {' | '.join(f'ratio, {kind}' for kind in kinds)} |"]
    lines.append("|---" * (1 + len(names) + len(kinds)) + "|")
    for row, of in figures.items():
        cells = [f"{statistics.median(of[name]):,.1f}" for name in names]
        for kind in kinds:
            own = [name for name in names if precisions[name] == kind and name.startswith("lmserve")]
            peers = [name for name in names if precisions[name] == kind and not name.startswith("lmserve")]
            if not own or not peers:
                cells.append("-")
                continue
            ratios = [value / max(of[name][at] for name in peers) for at, value in enumerate(of[own[0]])]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--peers", default="", help="names, comma-separated (default: all that are found)")
    parser.add_argument("--texts", type=int, default=256, help="of one request")
    parser.add_argument("--singles", type=int, default=32, help="texts that are sent one at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    cache = Path(tempfile.gettempdir()) / "lmserve-embed-models"
    parser.add_argument("--cache", type=Path, default=cache, help="where models are written (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="texts per second of processor time, not of the clock")
    parser.add_argument("--json", type=Path, help="write every figure of every round there")
    given = parser.parse_args()
    chosen = given.models.split(",")
    if unknown := set(chosen) - set(MODELS):
        parser.error(f"models are {', '.join(MODELS)}, but {', '.join(unknown)} was given")
    # As KeyboardInterrupt does, so that nobody is left behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    figures: Figures = {}
    precisions: dict[str, str] = {}
    for name in chosen:
        candidates = start(MODELS[name], given.cache, set(filter(None, given.peers.split(","))))
        try:
            words = [token for token in vocabulary(model_folder(MODELS[name], given.cache)) if token.isascii()]
            words = [token for token in words if token.isalpha() and len(token) > 2]
            figures |= measure(candidates, MODELS[name], words, given)
        finally:
            for candidate in candidates:
                candidate.end()
        precisions |= {candidate.name: candidate.precision for candidate in candidates}
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    print(table(figures, precisions))


if __name__ == "__main__":
    main()
