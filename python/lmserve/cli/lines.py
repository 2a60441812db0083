"""What a person types, as turns: a line, a pasted text, or lines between two lines of three quotation marks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

FENCE: Final = '"""'
HISTORY_LINES: Final = 1000


def history_file() -> Path:
    """Where the lines of earlier conversations are kept (XDG Base Directory Specification, state)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "lmserve" / "history"


class Lines:
    """Reads turns from stdin; in a terminal with line editing, and a history that outlives it."""

    def __init__(self, prompt: str = "> ", more: str = "… ") -> None:
        self.terminal = sys.stdin.isatty()
        self._prompt, self._more = (prompt, more) if self.terminal else ("", "")

    def __enter__(self) -> Self:
        if self.terminal:
            import readline

            # A pasted text of several lines comes as one.
            readline.parse_and_bind("set enable-bracketed-paste on")
            readline.set_history_length(HISTORY_LINES)
            with contextlib.suppress(OSError):
                readline.read_history_file(history_file())
        return self

    def __exit__(self, *exc: object) -> None:
        if self.terminal:
            import readline

            path = history_file()
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.touch(mode=0o600)
                readline.write_history_file(path)
            except OSError as error:
                print(f"the history could not be saved: {error}", file=sys.stderr)

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                line = input(self._prompt)
                yield self._whole(line) if line.lstrip().startswith(FENCE) else line
            except EOFError:
                if self.terminal:
                    print()
                return
            except KeyboardInterrupt:
                print()

    def _whole(self, line: str) -> str:
        """The text from three quotation marks to the next three, on this line or a later one."""
        text = line.lstrip().removeprefix(FENCE)
        while not text.rstrip().endswith(FENCE):
            try:
                text += "\n" + input(self._more)
            except EOFError:
                return text
        return text.rstrip().removesuffix(FENCE).strip("\n")
