"""The command line. Commands import what they need when they run, so that `lmserve --help` loads no model code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lmserve import __version__
from lmserve.cli import bench, chat, fetch, plan, serve, simulate
from lmserve.cli.errors import CommandError


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    description = "An LLM inference server whose conversations live on the server."
    top = argparse.ArgumentParser(prog="lmserve", description=description)
    top.add_argument("--version", action="version", version=f"lmserve {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (serve, chat, bench, plan, fetch, simulate):
        module.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 1 with one line on stderr; a usage error exits with 2."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except CommandError as error:
        print(f"lmserve: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
