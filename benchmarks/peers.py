"""lmserve and the peers found on the machine, interleaved: round after round, each point of each server in turn.

    .venv/bin/python benchmarks/peers.py [--rounds 3] [--points NAME,NAME] [--model FILE.gguf] [--json FILE]

See benchmarks/README.md for the peers and how they are found. All servers are up during a point, but all except the one
that is measured are stopped (SIGSTOP). Prints a Markdown table: medians, and the ratio to the best peer and its spread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from lmserve.assets import SMOLLM2, fetch
from lmserve.bench.campaign import Campaign, measure
from lmserve.bench.http import Target
from lmserve.bench.load import Load, Server
from lmserve.bench.report import RunReport
from lmserve.bench.workload import WORKLOADS, Sizes

STARTING_SECONDS: Final = 120
LARGEST: Final = "mixed-32"
START: Final = "start to first token, s"


@dataclass(frozen=True)
class Point:
    """One workload at one concurrency, and the figure of it that counts."""

    name: str
    workload: str
    concurrency: int
    unit: str
    figure: Callable[[RunReport], float]
    better: Literal["higher", "lower"]
    sizes: Sizes = field(default_factory=Sizes)
    # What a peer must be told that gives each client a share of its KV cache: shares, and the tokens of each.
    slots: int = 8
    slot_tokens: int = 4608

    @property
    def row(self) -> str:
        return f"{self.name}, {self.unit}"


def _first_token(report: RunReport) -> float:
    return float("nan") if report.ttft_ms is None else report.ttft_ms.p50


def _last_turn(report: RunReport) -> float:
    first, last = report.turn_ttft_ms[0], report.turn_ttft_ms[-1]
    return float("nan") if first is None or last is None else last.p50 / first.p50


def _rate(report: RunReport) -> float:
    return report.output_tokens_per_s


def _elapsed(report: RunReport) -> float:
    return report.elapsed_s


POINTS: Final = (
    Point("mixed-1", "mixed", 1, "output tokens/s", _rate, "higher", Sizes(requests=6), 32, 1024),
    Point("mixed-8", "mixed", 8, "output tokens/s", _rate, "higher", Sizes(requests=24), 32, 1024),
    Point("mixed-32", "mixed", 32, "output tokens/s", _rate, "higher", Sizes(requests=64), 32, 1024),
    Point("long-prompt", "long-prompt", 1, "ms to first token", _first_token, "lower", Sizes(2, 2)),
    Point("prompt", "prompt", 1, "ms to first token", _first_token, "lower", Sizes(16, 3)),
    Point("agent", "agent", 1, "s for 20 turns", _elapsed, "lower", slots=1, slot_tokens=14336),
    Point("shared-prefix", "shared-prefix", 8, "s for 32 requests", _elapsed, "lower"),
    Point("chat", "chat", 8, "output tokens/s", _rate, "higher"),
)


@dataclass
class Candidate:
    """A server to measure, and the command that starts it for a point; {port} in it is where it must listen."""

    name: str
    command: Callable[[Point], list[str]]
    process: subprocess.Popen[bytes] | None = None
    running: list[str] = field(default_factory=list)
    url: str = ""

    def ready(self, point: Point) -> float | None:
        """Start it for `point`, unless it runs as that point needs it; seconds from its start to its first token.

        Raises RuntimeError if that does not come.
        """
        command = self.command(point)
        if command == self.running:
            return None
        self.end()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        log = Path(tempfile.gettempdir()) / f"peers-{self.name.replace(' ', '-')}.log"
        started = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [part.replace("{port}", str(port)) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() - started > STARTING_SECONDS:
                raise RuntimeError(f"{self.name} did not start; its output is in {log}")
            time.sleep(0.02)
        self.running = command
        return time.monotonic() - started

    def end(self) -> None:
        """Stop it, where it runs."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        self.running = []

    def _answers(self) -> bool:
        body = {"model": SMOLLM2.name, "prompt": "Hello", "max_tokens": 1}
        request = urllib.request.Request(  # noqa: S310 - of the server that was started here
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=STARTING_SECONDS) as reply:  # noqa: S310
                return bool(reply.status == 200)
        except OSError:
            return False

    def resident(self) -> int:
        """Bytes of memory that the processes of its group have in RAM, shared pages counted once for each."""
        total, group = 0, self._group()
        for folder in Path("/proc").glob("[0-9]*"):
            # Processes come and go while they are listed.
            with contextlib.suppress(OSError):
                if os.getpgid(int(folder.name)) == group:
                    pages = int((folder / "statm").read_text().split()[1])
                    total += pages * os.sysconf("SC_PAGE_SIZE")
        return total

    def signal(self, number: signal.Signals) -> None:
        """Send it and its children a signal, where it runs."""
        if (group := self._group()) is not None:
            os.killpg(group, number)

    def _group(self) -> int | None:
        running = self.process is not None and self.process.poll() is None
        return self.process.pid if running and self.process is not None else None


def find(variable: str, command: str) -> str | None:
    """A program, by environment variable or PATH."""
    return os.environ.get(variable) or shutil.which(command)


def candidates(file: Path | None) -> list[Candidate]:
    """lmserve first, then the peers that are here; with `file`, those that serve it as it is."""
    own = [sys.executable, "-m", "lmserve", "serve", "--port", "{port}", *_extra("LMSERVE_ARGS")]
    if file is not None:
        own += ["--served-model-name", SMOLLM2.name, str(file)]
    found = [Candidate("lmserve", lambda _: own)]
    server = find("LLAMA_SERVER", "llama-server")
    other = find("IK_LLAMA_SERVER", "ik-llama-server")
    if file is not None:
        if server:
            found.append(Candidate("llama-server", _llama(server, file)))
        if other:
            found.append(Candidate("ik_llama.cpp", _ik_llama(other, file)))
        return found
    model = fetch(SMOLLM2)
    if other:
        found.append(Candidate("ik_llama.cpp Q4_1", _ik_llama(other, model)))
    if server:
        found.append(Candidate("llama-server Q4_1", _llama(server, model)))
        beside = Path(server).with_name("llama-quantize")
        quantize = str(beside) if beside.exists() else find("LLAMA_QUANTIZE", "llama-quantize")
        if quantize:
            found.append(Candidate("llama-server Q4_0", _llama(server, requantized(quantize, model))))
    folder, program = os.environ.get("VLLM_MODEL"), find("VLLM", "vllm")
    if program and folder:
        vllm = [program, "serve", folder, "--port", "{port}", "--served-model-name", SMOLLM2.name, *_extra("VLLM_ARGS")]
        found.append(Candidate("vLLM", lambda _: vllm))
    return found


def _llama(server: str, model: Path) -> Callable[[Point], list[str]]:
    threads = len(os.sched_getaffinity(0))

    def command(point: Point) -> list[str]:
        # With one cache for all slots (--kv-unified) it is slower: each sequence then attends over the cells of all.
        slots = ["-np", str(point.slots), "-c", str(point.slots * point.slot_tokens), "--no-kv-unified"]
        common = [server, "-m", str(model), "--port", "{port}", "--no-webui", "-t", str(threads)]
        return [*common, *slots, *_extra("LLAMA_ARGS")]

    return command


def _ik_llama(server: str, model: Path) -> Callable[[Point], list[str]]:
    """ik_llama.cpp's server: attention by its flash kernels, rows interleaved at load, one cache for all slots.

    It does not read the `ignore_eos` of a completion, so its command says it.
    """
    threads = len(os.sched_getaffinity(0))

    def command(point: Point) -> list[str]:
        slots = ["-np", str(point.slots), "-c", str(point.slots * point.slot_tokens)]
        common = [server, "-m", str(model), "--port", "{port}", "-t", str(threads)]
        return [*common, *slots, "-fa", "on", "-rtr", "--ignore-eos", *_extra("IK_LLAMA_ARGS")]

    return command


def _extra(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def requantized(quantize: str, model: Path) -> Path:
    """The model as Q4_0, for which llama.cpp has faster kernels; made once."""
    path = Path(tempfile.gettempdir()) / f"{model.stem}-to-Q4_0.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        command = [quantize, "--allow-requantize", str(model), str(partial), "Q4_0", "1"]
        subprocess.run(command, check=True, capture_output=True)
        partial.rename(path)
    return path


class Silent:
    """No word of a run's progress."""

    def started(self, server: Server) -> None:
        pass

    def progressed(self, load: Load) -> None:
        pass

    def finished(self, report: RunReport) -> None:
        pass


Figures = dict[str, dict[str, list[float]]]  # row -> server -> of each round


def run(servers: Sequence[Candidate], points: Sequence[Point], rounds: int, seed: int) -> Figures:
    """Every figure of every round."""
    figures: Figures = {}

    def note(row: str, server: Candidate, value: float) -> None:
        figures.setdefault(row, {}).setdefault(server.name, []).append(value)

    try:
        for at in range(rounds):
            for point in points:
                # Nobody is always first.
                for server in (*servers[at % len(servers) :], *servers[: at % len(servers)]):
                    start = server.ready(point)
                    if point == points[0] and start is not None:
                        note(START, server, start)
                    report = measure_one(server, point, seed + at)
                    note(point.row, server, point.figure(report))
                    if point.workload == "chat":
                        note("chat, first token of turn 6 / turn 1", server, _last_turn(report))
                    if point.name == LARGEST:
                        note(f"memory after {LARGEST}, MiB", server, server.resident() / 2**20)
            # Every round begins with new processes: what a cache has kept of one is no part of the next.
            for server in servers:
                server.end()
    finally:
        for server in servers:
            server.end()
    return figures


def measure_one(server: Candidate, point: Point, seed: int) -> RunReport:
    campaign = Campaign(
        target=Target(server.url),
        workloads=(WORKLOADS[point.workload],),
        concurrency=(point.concurrency,),
        sizes=point.sizes,
        seed=seed,
        timeout=1800,
    )
    server.signal(signal.SIGCONT)
    (report,) = measure(campaign, Silent()).runs
    server.signal(signal.SIGSTOP)
    if report.errors:
        raise RuntimeError(f"{server.name} failed in {point.name}: {report.errors}")
    print(f"{point.name:<14} {server.name:<20} {point.figure(report):10.1f} {point.unit}", file=sys.stderr, flush=True)
    return report


def table(figures: Figures, servers: Sequence[Candidate]) -> str:
    """Medians as Markdown, with the ratio to each round's best peer: its median, lowest and highest; more is better."""
    ours, *peers = (server.name for server in servers)
    higher = {point.row for point in POINTS if point.better == "higher"}
    lines = [f"| | {ours} | {' | '.join(peers)} | ratio | lowest to highest |", "|---" * (len(peers) + 4) + "|"]
    for row, of in figures.items():
        medians = [f"{statistics.median(of[name]):,.1f}" for name in (ours, *peers)]
        ratios = []
        for at, own in enumerate(of[ours]):
            theirs = [of[name][at] for name in peers]
            if theirs:
                ratios.append(own / max(theirs) if row in higher else min(theirs) / own)
        spread = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}" if ratios else "- | -"
        lines.append(f"| {row} | {' | '.join(medians)} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    names = [point.name for point in POINTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", default=",".join(names), help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--servers", help="names, comma-separated (default: all that are found)")
    parser.add_argument("--model", type=Path, help="a GGUF file to serve (default: the default model, and its Q4_0)")
    parser.add_argument("--json", type=Path, help="write every figure of every round there")
    arguments = parser.parse_args()
    chosen = arguments.points.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"points are {', '.join(names)}, but {', '.join(unknown)} was given")
    found = {server.name: server for server in candidates(arguments.model)}
    wanted = arguments.servers.split(",") if arguments.servers else list(found)
    if missing := set(wanted) - set(found):
        parser.error(f"{', '.join(missing)} was asked for, but found: {', '.join(found)}")
    servers = [found[name] for name in wanted]
    # As KeyboardInterrupt does, so that no server is left behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    print(f"servers: {', '.join(wanted)}", file=sys.stderr)
    figures = run(servers, [p for p in POINTS if p.name in chosen], arguments.rounds, seed=int(time.time()))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    print(table(figures, servers))


if __name__ == "__main__":
    main()
