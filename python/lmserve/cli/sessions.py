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
Check or repair the log of a --session-dir. No server may be running on it.

check reports what the log contains, and which sessions and turns it has lost. It changes nothing. repair does what a
server does at its start: it moves torn and damaged records into a file beside the log, and writes the log anew without
them. A session that has lost turns is read-only at its last good turn until it is rewound or forked.

The exit code is 1 if something is lost or the log cannot be read.
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
        return ["sessions.log: nothing has been written to it"]
    said = [
        f"sessions.log: format {report.version}, written with {report.model}",
        f"{report.sessions} sessions of {report.turns} turns and {report.tokens} tokens, in {report.bytes} bytes",
    ]
    if report.torn:
        said.append(f"{report.torn} bytes at its end belong to a record that was only written in part")
    if report.damaged:
        said.append(f"{report.damaged} bytes are damaged")
    said += [str(loss) for loss in report.losses]
    if report.unnamed:
        said.append(f"{report.unnamed} records are missing, and it is not known which sessions they belonged to")
    if report.kept:
        said.append(f"the torn and damaged records are kept in {report.kept}")
    if report.is_whole and not report.torn:
        said.append("nothing is lost")
    elif not repaired:
        said.append("lmserve sessions repair moves the damaged records into a separate file and repairs the log")
    return said
