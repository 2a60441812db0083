"""How a command fails: one line, no traceback."""

from __future__ import annotations


class CommandError(Exception):
    """The command cannot go on. `exit_code` is 2 if it was called wrongly, else 1."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
