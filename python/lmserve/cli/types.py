"""Types shared by the commands, for the type checker alone."""

from __future__ import annotations

import argparse

from lmserve.cli.help import Parser

Commands = argparse._SubParsersAction[Parser]  # noqa: SLF001 - argparse gives this type no public name
