"""Write lmserve(1), the manual page, from the command line's own help.

Usage: .venv/bin/python tools/man.py FILE
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lmserve import __version__
from lmserve.cli import parser
from lmserve.cli.completion import commands_of, flags_of


def escaped(text: str) -> str:
    """Text that roff leaves as it is (groff_char(7), man-pages(7))."""
    text = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.strip().split("\n\n"):
        if paragraph.startswith("  ") or "\n  " in paragraph:
            # Columns stay columns.
            yield ".nf"
            yield from (escaped_line(line) for line in paragraph.splitlines())
            yield ".fi"
        else:
            yield escaped(paragraph)
        yield ".PP"


def escaped_line(line: str) -> str:
    indent = len(line) - len(line.lstrip())
    return "\\ " * indent + escaped(line).removeprefix("\\&") if indent else escaped(line)


def entries(command: argparse.ArgumentParser) -> Iterator[str]:
    for action in flags_of(command):
        value = "" if action.nargs == 0 else f" \\fI{escaped(action.metavar or action.dest.upper())}\\fR"
        names = ", ".join(f"\\fB{escaped(name)}\\fR" for name in action.option_strings)
        yield from (".TP", f"{names}{value}", escaped(action.help or ""))


def page() -> str:
    """The manual page, in roff."""
    top = parser()
    lines = [
        f'.TH LMSERVE 1 "" "lmserve {__version__}" "User Commands"',
        ".SH NAME",
        "lmserve \\- serve language models, with conversations that live on the server",
        ".SH SYNOPSIS",
        "\\fBlmserve\\fR \\fICOMMAND\\fR [\\fIOPTIONS\\fR]",
        ".SH DESCRIPTION",
        *paragraphs(top.description or ""),
        ".SH COMMANDS",
    ]
    for name, (text, command) in commands_of(top).items():
        usage = textwrap.shorten(command.short_help().partition("\n\n")[0].removeprefix("usage: "), 500)
        lines += [f".SS lmserve {name}", f"{escaped(text)}.", ".PP", f"\\fB{escaped(usage)}\\fR", ".PP"]
        lines += paragraphs(command.description or "")
        lines += entries(command)
    lines += [
        ".SH ENVIRONMENT",
        "Each flag of \\fBlmserve serve\\fR has a variable: LMSERVE_MAX_BODY is \\fB\\-\\-max\\-body\\fR.",
        ".SH EXIT STATUS",
        "0 where all is well, 1 where a command failed, with one line on stderr, 2 where it was called wrongly.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
