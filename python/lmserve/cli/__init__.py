"""The command line. Commands import what they need when they run, so that `lmserve --help` loads no model code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lmserve import __version__
from lmserve.cli import bench, chat, completion, doctor, models, plan, quantize, replay, run, serve, sessions, simulate
from lmserve.cli.aliases import translated
from lmserve.cli.errors import CommandError
from lmserve.cli.help import Parser
from lmserve.cli.secrets import hide
from lmserve.cli.terminal import fitted


def parser() -> Parser:
    """The whole command line."""
    description = "An LLM inference server that keeps conversations on the server."
    top = Parser(prog="lmserve", description=description)
    top.add_argument("--version", action="version", version=f"lmserve {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (run, serve, chat, models, plan, quantize, doctor, bench, sessions, simulate, replay, completion):
        module.add_parser(commands)
    commands.choices["completion"].set_defaults(top=top)
    return top


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command. Raises CommandError for a flag of another server that has no match here."""
    if argv and argv[0] in ("serve", "plan"):
        argv = [argv[0], *translated(argv[1:])]
    return parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 1 with one line on stderr; a usage error exits with 2."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        hide((*(getattr(arguments, "api_keys", None) or ()), getattr(arguments, "api_key", None) or ""))
        return int(arguments.run(arguments))
    except CommandError as error:
        print(fitted(f"lmserve: error: {error}", sys.stderr), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
