"""Records `lmserve run` in a terminal and draws the recording as an animated SVG: python tools/cast.py FILE.svg.

Needs tmux, which is the terminal. Without animation (prefers-reduced-motion) the last screen is shown.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Final

COLUMNS, ROWS = 76, 15
WIDTH, HEIGHT, MARGIN = 8.4, 18, 14  # pixels of a character, of a row, and around the screen
TYPING: Final = 0.05  # seconds for a key
READING: Final = 1.6  # seconds to read an answer
LONGEST: Final = 1.0  # seconds of a wait that are shown
END: Final = 4.0  # seconds of the last screen
SGR: Final = re.compile(r"\x1b\[([\d;]*)m")
COLOURS: Final = ("#6e7681", "#ff7b72", "#7ee787", "#e3b341", "#79c0ff", "#d2a8ff", "#76e3ea", "#e6edf3")
# What is typed, and how the screen must end before the next line.
SCRIPT: Final = (
    ("lmserve run --temperature 0", r"/help .*\n>"),
    ("What is the capital of Japan?", r"\?\n.*Tokyo.*\n>"),
    ("How many people live there?", r"\?\n.*Japan.*\n>"),
    ("/rewind", r"/rewind\n>"),
    ("What language do they speak?", r"speak\?\n.+\n>"),
    ("/bye", r"/bye\n\$"),
)

Screen = tuple[str, ...]


class Terminal:
    """A tmux session of its own; each change of its screen is kept with its time."""

    def __init__(self, folder: Path) -> None:
        self._tmux = ["tmux", "-S", str(folder / "socket"), "-f", "/dev/null"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        shell = ["env", f"PATH={path}", "PS1=$ ", "bash", "--norc", "--noprofile"]
        self._run("new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), *shell)
        self.frames: list[tuple[float, Screen]] = []
        self._shown = 0.0  # seconds of the recording so far
        self._looked = time.monotonic()
        self.wait(lambda text: "$" in text)
        self.frames.clear()

    def type(self, text: str) -> None:
        for key in text:
            self._run("send-keys", "-l", key)
            time.sleep(TYPING)
            self.look()
        self._run("send-keys", "Enter")

    def wait(self, condition: Callable[[str], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition("\n".join(plain(row) for row in self.look())):
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(self.look()))
            time.sleep(0.04)

    def pause(self, seconds: float) -> None:
        self._shown += seconds
        self._looked = time.monotonic()

    def look(self) -> Screen:
        """The screen now."""
        now = time.monotonic()
        self._shown += min(now - self._looked, LONGEST) if self.frames else 0
        self._looked = now
        screen = tuple(self._run("capture-pane", "-p", "-e").split("\n")[:ROWS])
        if not self.frames or screen != self.frames[-1][1]:
            self.frames.append((self._shown, screen))
        return screen

    def close(self) -> None:
        self._run("kill-server")

    def _run(self, *words: str) -> str:
        return subprocess.run([*self._tmux, *words], check=True, capture_output=True, text=True).stdout


def plain(row: str) -> str:
    return SGR.sub("", row)


def record(folder: Path) -> list[tuple[float, Screen]]:
    """The screens of the script, each with the seconds since the beginning."""
    terminal = Terminal(folder)
    try:
        for text, expected in SCRIPT:
            terminal.type(text)
            terminal.wait(lambda screen, expected=expected: re.search(expected + r"\Z", screen.strip()))  # type: ignore[misc]
            terminal.look()
            terminal.pause(READING)
        terminal.look()
    finally:
        terminal.close()
    return terminal.frames


def versions(frames: list[tuple[float, Screen]], row: int, end: float) -> Iterator[tuple[float, float, str]]:
    """What a row of the screen shows, from when and until when."""
    began, shown = 0.0, ""
    for at, screen in [*frames, (end, ())]:
        text = screen[row].rstrip() if row < len(screen) else ""
        if text != shown or not screen:
            if plain(shown).strip():
                yield began, at, shown
            began, shown = at, text


def spans(text: str) -> str:
    """A row with its styles as SVG."""
    parts, weight, colour = [], "", ""
    for number, part in enumerate(SGR.split(text)):
        if number % 2:
            for code in part.split(";"):
                value = int(code or 0)
                if value == 0:
                    weight = colour = ""
                elif value == 1:
                    weight = ' font-weight="bold"'
                elif value == 2:
                    colour = f' fill="{COLOURS[0]}"'
                elif value in (22, 39):
                    weight, colour = ("", colour) if value == 22 else (weight, "")
                elif 30 <= value <= 37 or 90 <= value <= 97:
                    colour = f' fill="{COLOURS[value % 10]}"'
        elif part:
            style = weight + colour
            parts.append(f"<tspan{style}>{escape(part)}</tspan>" if style else escape(part))
    return "".join(parts)


def drawn(frames: list[tuple[float, Screen]]) -> str:
    """The recording as an SVG."""
    end = frames[-1][0] + END
    width, height = COLUMNS * WIDTH + 2 * MARGIN, ROWS * HEIGHT + 2 * MARGIN
    rules, texts = [], []
    for row in range(ROWS):
        for began, until, text in versions(frames, row, end):
            name = f"r{len(rules)}"
            first, last = 100 * began / end, 100 * until / end
            hidden = f"{last:.3f}%,100%{{visibility:hidden}}" if until < end else ""
            rules.append(
                f"@keyframes {name}{{0%{{visibility:hidden}}{first:.3f}%{{visibility:visible}}{hidden}}}"
                f"#{name}{{animation-name:{name}{'' if until == end else ';visibility:hidden'}}}"
            )
            y = MARGIN + HEIGHT * (row + 0.75)
            texts.append(f'<text id="{name}" x="{MARGIN}" y="{y:g}" xml:space="preserve">{spans(text)}</text>')
    style = (
        "text{font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#e6edf3;"
        f"animation:{end:.2f}s step-end infinite}}"
        "@media (prefers-reduced-motion:reduce){text{animation:none!important}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">'
        "<title>lmserve run: two questions, a rewind, and another question</title>"
        f'<style>{style}{"".join(rules)}</style><rect width="100%" height="100%" rx="8" fill="#0d1117"/>'
        f"{''.join(texts)}</svg>\n"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        frames = record(Path(folder))
    Path(sys.argv[1]).write_text(drawn(frames), "utf-8")


if __name__ == "__main__":
    main()
