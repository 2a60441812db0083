"""Integers on the command line that must lie within limits."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def bounded(low: int, high: int) -> Callable[[str], int]:
    """Parse an integer from low to high, for an argument's `type`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"an integer in [{low}, {high}] is needed, but {text!r} was given")
        return value

    return parse
