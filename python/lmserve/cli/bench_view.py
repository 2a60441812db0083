"""What `lmserve bench` prints: a row for each run, meanwhile its progress, and what a fit came to."""

from __future__ import annotations

import sys
from time import perf_counter

from lmserve.bench.load import Load, Server
from lmserve.bench.report import RunReport
from lmserve.bench.table import COLUMNS, HEAD, block, row
from lmserve.capacity.setup import PARTS, Fit
from lmserve.cli.terminal import columns, fitted

BAR_CHARACTERS = 24
REDRAW_SECONDS = 0.1


class TerminalView:
    """Rows on stdout; the run in progress as a bar on stderr, where that is a terminal."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._bar = sys.stderr.isatty()
        self._drawn = 0.0
        # Not in a file or a pipe, whose lines have no end.
        self._narrow = 0 < columns(sys.stdout) < COLUMNS

    def started(self, server: Server) -> None:
        about = fitted(f"{server.model} at {server.target.url}, seed {self._seed}", sys.stdout, indent=2)
        print(f"{about}\n" if self._narrow else f"{about}\n\n{HEAD}", flush=True)

    def progressed(self, load: Load) -> None:
        now = perf_counter()
        done = len(load.outcomes)
        if not self._bar or (now - self._drawn < REDRAW_SECONDS and done < load.total):
            return
        self._drawn = now
        bar = _bar(done, load.total)
        tokens = sum(outcome.usage.completion_tokens for outcome in load.outcomes if outcome.usage is not None)
        rate = tokens / (now - load.started)
        line = f"{load.workload.name:<14}{load.concurrency:>8} {bar} {done} of {load.total}, {rate:,.0f} tokens/s"
        # One line, and no column of the next.
        print(f"\r\x1b[K{line[: max(columns(sys.stderr) - 1, 0)]}", end="", file=sys.stderr, flush=True)

    def finished(self, report: RunReport) -> None:
        if self._bar:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        print(block(report) if self._narrow else row(report), flush=True)


def draw_fit(done: int, total: int) -> None:
    """The progress of a fit, on stderr where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\rtiming steps {_bar(done, total)} {done} of {total}", end="", file=sys.stderr, flush=True)
        if done == total:
            print(file=sys.stderr)


def fit_table(fit: Fit) -> str:
    """Every step that was timed, the parts that were fitted, and how far they are off."""
    lines = [f"{'decoding':>9} {'prompt':>7} {'context':>8} {'measured':>10} {'fitted':>9}"]
    for step in fit.steps:
        sizes = f"{step.decode:>9} {step.prefill:>7} {step.context:>8}"
        lines.append(f"{sizes} {step.measured_ms:>7.2f} ms {step.fitted_ms:>6.2f} ms")
    parts = (f"{part:>20} {getattr(fit.step_model, part):.6f}" for part in PARTS)
    return "\n".join([*lines, "", *parts, f"{'mean error':>20} {fit.mean_error:.1%}"])


def _bar(done: int, total: int) -> str:
    filled = BAR_CHARACTERS * done // total
    return f"[{'#' * filled}{'.' * (BAR_CHARACTERS - filled)}]"
