"""A download's progress on stderr: a bar in a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import sys
import time

from lmserve.config import format_size

BAR_CHARACTERS = 32


class DownloadProgress:
    """Call it with bytes done and bytes in all; it draws what is new."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self._drawn = -1  # percent
        self._bar = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // total
        if percent == self._drawn or (not self._bar and percent < 100 and percent // 10 == self._drawn // 10):
            return
        self._drawn = percent
        elapsed = max(time.monotonic() - self._started, 1e-3)
        line = f"{format_size(done)} of {format_size(total)}, {format_size(int(done / elapsed))}/s"
        if not self._bar:
            print(f"Fetching {self._what}: {percent} %, {line}", file=sys.stderr, flush=True)
            return
        filled = BAR_CHARACTERS * done // total
        bar = "#" * filled + "." * (BAR_CHARACTERS - filled)
        end = "\n" if done >= total else ""
        # Pad: the line before may have been longer.
        print(f"\rFetching {self._what} [{bar}] {percent:3d} %  {line:<40}", end=end, file=sys.stderr, flush=True)
