"""How many of a test's inputs `make test` tries, and how many `make test-thorough`."""

from __future__ import annotations

import os
from typing import Final

THOROUGH: Final = "THOROUGH" in os.environ


def of(usual: int, thorough: int) -> int:
    """The number of inputs that this run tries."""
    return thorough if THOROUGH else usual
