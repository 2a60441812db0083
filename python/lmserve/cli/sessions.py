"""`lmserve sessions`: look at a session log, or mend it, while no server runs on it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lmserve.cli.errors import CommandError

if TYPE_CHECKING:
    from lmserve.cli.types import Commands
    from lmserve.engine.sessions import LogReport

DESCRIPTION = """\
Look at the log of a --session-dir, or mend it, while no server runs on it.

check says what the log has, and which sessions and turns it has lost; it changes nothing. repair does what a server
does that starts with the log: what is torn or damaged is kept in a file beside it, and the log is written anew without
it. Sessions that lost turns are read-only at their last good one until they are rewound or forked.

The exit code is 1 where something is lost, or the log cannot be read.
"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "sessions",
        help="check or repair the log of a --session-dir",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", metavar="ACTION", choices=("check", "repair"), help="check or repair")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the --session-dir")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from lmserve import _core
    from lmserve.engine.sessions import log_report_of
    from lmserve.errors import LmserveError

    repair = arguments.action == "repair"
    work = _core.repair_session_log if repair else _core.check_session_log
    try:
        report = log_report_of(work(arguments.folder))
    except LmserveError as error:
        raise CommandError(str(error)) from error
    for line in lines(report, repaired=repair):
        print(line)
    return 0 if report.is_whole else 1


def lines(report: LogReport, *, repaired: bool) -> list[str]:
    """What a report says, for people."""
    if report.model is None:
        return ["sessions.log: it was never begun"]
    said = [
        f"sessions.log: format {report.version}, written with {report.model}",
        f"{report.sessions} sessions of {report.turns} turns and {report.tokens} tokens, in {report.bytes} bytes",
    ]
    if report.torn:
        said.append(f"{report.torn} bytes at its end belong to a record that was written in part")
    if report.damaged:
        said.append(f"{report.damaged} bytes are damaged")
    said += [str(loss) for loss in report.losses]
    if report.unnamed:
        said.append(f"{report.unnamed} records are missing, and nobody can say whose they were")
    if report.kept:
        said.append(f"what is torn or damaged is kept in {report.kept}")
    if report.is_whole and not report.torn:
        said.append("nothing is lost")
    elif not repaired:
        said.append("lmserve sessions repair keeps what is damaged in a file of its own, and mends the log")
    return said
