"""`lmserve doctor`: what this machine has for a server, one measured token, and what to change."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import TYPE_CHECKING

from lmserve.cli.errors import CommandError
from lmserve.cli.serve import config_from

if TYPE_CHECKING:
    from lmserve.cli.types import Commands
    from lmserve.doctor import Finding

INDENT = 11


def add_parser(commands: Commands) -> None:
    description = (
        "Check the processor, the memory, the container's limits, torch, GPUs and the cache, measure "
        "how fast a model answers on this machine, and advise what to change. Exits with 1 if a server "
        "cannot run."
    )
    parser = commands.add_parser("doctor", help="check this machine and advise what to change", description=description)
    help_text = "the model to measure (default: the default model if it is in the cache, else none)"
    parser.add_argument("model", metavar="MODEL", nargs="?", help=help_text)
    parser.add_argument("--no-speed", action="store_true", help="do not measure a model")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from lmserve import doctor
    from lmserve.assets import SMOLLM2
    from lmserve.errors import LmserveError
    from lmserve.source import SourceError
    from lmserve.stored import find_stored

    found = doctor.findings(doctor.examine())
    try:
        config_from([])
    except CommandError as error:
        found.append(doctor.Finding("Settings", "of the environment", str(error), broken=True))
    if not arguments.no_speed and (arguments.model or find_stored(SMOLLM2.name)):
        try:
            found.append(doctor.speed_finding(doctor.measure(arguments.model)))
        except (SourceError, LmserveError) as error:
            found.append(doctor.Finding("Speed", "not measured", str(error), broken=True))
    width = shutil.get_terminal_size().columns
    for finding in found:
        _print(finding, width)
    return 1 if any(finding.broken for finding in found) else 0


def _print(finding: Finding, width: int) -> None:
    indent = " " * INDENT
    print(textwrap.fill(finding.text, width, initial_indent=f"{finding.name:<{INDENT}}", subsequent_indent=indent))
    if finding.advice is not None:
        print(textwrap.fill(finding.advice, width, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   "))
