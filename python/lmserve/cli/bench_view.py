"""What `lmserve bench` prints: a row for each run, and meanwhile its progress."""

from __future__ import annotations

import sys
from time import perf_counter

from lmserve.bench.load import Load, Server
from lmserve.bench.report import RunReport
from lmserve.bench.table import HEAD, row

BAR_CHARACTERS = 24
REDRAW_SECONDS = 0.1


class TerminalView:
    """Rows on stdout; the run in progress as a bar on stderr, where that is a terminal."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._bar = sys.stderr.isatty()
        self._drawn = 0.0

    def started(self, server: Server) -> None:
        print(f"{server.model} at {server.target.url}, seed {self._seed}\n\n{HEAD}", flush=True)

    def progressed(self, load: Load) -> None:
        now = perf_counter()
        done = len(load.outcomes)
        if not self._bar or (now - self._drawn < REDRAW_SECONDS and done < load.total):
            return
        self._drawn = now
        filled = BAR_CHARACTERS * done // load.total
        bar = "#" * filled + "." * (BAR_CHARACTERS - filled)
        tokens = sum(outcome.usage.completion_tokens for outcome in load.outcomes if outcome.usage is not None)
        rate = tokens / (now - load.started)
        line = f"{load.workload.name:<14}{load.concurrency:>8} [{bar}] {done} of {load.total}, {rate:,.0f} tokens/s"
        print(f"\r{line:<90}", end="", file=sys.stderr, flush=True)

    def finished(self, report: RunReport) -> None:
        if self._bar:
            print(f"\r{'':<90}\r", end="", file=sys.stderr, flush=True)
        print(row(report), flush=True)
