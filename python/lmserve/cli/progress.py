"""Progress of work on bytes, on stderr: one line that is drawn anew in a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Final

from lmserve.config import format_size

BAR_CHARACTERS: Final = 32
SECONDS: Final = 0.1  # between two drawings


class DownloadProgress:
    """Call it with bytes done and bytes in all (0: not known); it draws what is new."""

    def __init__(self, what: str, verb: str = "Fetching") -> None:
        self._what = f"{verb} {what}"
        self._terminal = sys.stderr.isatty()
        self._started: float | None = None
        self._first = 0  # bytes that were there when this process began
        self._drawn = -1  # percent, or with no total tenths of a GiB
        self._last = 0.0
        self._ended = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._started is None:
            if total and done >= total:
                # Nothing had to come.
                return
            self._started, self._first = now, done
        ends = bool(total) and done >= total
        if self._ended or (self._terminal and not ends and now - self._last < SECONDS):
            return
        step = done // (total // 10 or 1) if total else done // (100 << 20)
        if not self._terminal and not ends and step == self._drawn:
            return
        self._drawn, self._last, self._ended = step, now, ends
        rate = int((done - self._first) / max(now - self._started, 1e-3))
        if self._terminal:
            width = shutil.get_terminal_size().columns
            line = self.line(done, total, rate, width - 1)
            sys.stderr.write(f"\r{line}\x1b[K" + ("\n" if ends else ""))
            sys.stderr.flush()
        else:
            print(self.line(done, total, rate, 1000, bar=False), file=sys.stderr, flush=True)

    def line(self, done: int, total: int, rate: int, width: int, *, bar: bool = True) -> str:
        """The line, in at most `width` characters: what matters least is left out first."""
        percent = f"{100 * done // total} %" if total else ""
        sizes = f"{format_size(done)} of {format_size(total)}" if total else format_size(done)
        numbers = ", ".join(part for part in (percent, sizes, f"{format_size(rate)}/s") if part)
        room = width - len(f"{self._what}: {numbers}") - 3
        if total and bar and room >= 8:
            length = min(room, BAR_CHARACTERS)
            filled = length * done // total
            return f"{self._what} [{'#' * filled}{'.' * (length - filled)}] {numbers}"
        for line in (f"{self._what}: {numbers}", f"{self._what}: {percent or sizes}", numbers):
            if len(line) <= width:
                return line
        return (percent or sizes)[:width]
