"""Lines for a person: as wide as the terminal and broken between words; a file or a pipe gets each line whole."""

from __future__ import annotations

import os
import textwrap
from typing import Final, TextIO

# Under the text of lines that begin with a name and its value, such as "Model     ...".
UNDER_VALUES: Final = 10


def fitted(line: str, stream: TextIO, indent: int = 0) -> str:
    """`line` as several where it is too long for the terminal behind `stream`, all but the first indented.

    A word that is longer than the terminal is wide, such as a path, stays whole.
    """
    width = columns(stream)
    if len(line) <= width or width <= indent:
        return line
    under = " " * indent
    return textwrap.fill(line, width, subsequent_indent=under, break_long_words=False, break_on_hyphens=False)


def columns(stream: TextIO) -> int:
    """How wide the terminal is; 0 if there is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0
