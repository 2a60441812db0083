"""`lmserve replay`: run the steps again that `lmserve serve --record` wrote down."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lmserve.cli.errors import CommandError
from lmserve.config import OPS
from lmserve.errors import LmserveError

if TYPE_CHECKING:
    from lmserve.cli.types import Commands

DESCRIPTION: Final = """\
Run every step that `lmserve serve --record FILE` has recorded again on the same model, and compare the sampled tokens.
Exits with 0 if all tokens are the same, and with 1 otherwise.
"""
MOST_SHOWN: Final = 10
MOST_RANK: Final = 1 << 16  # of an adapter; the server that recorded it had a limit


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "replay",
        help="run a recording again and compare the tokens",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the recording that --record has written")
    parser.add_argument(
        "--model", metavar="PATH", type=Path, help="path of the model (default: its path in the recording)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="run on another device (default: the recorded one)")
    parser.add_argument(
        "--ops",
        metavar="OPS",
        choices=OPS,
        help=f"compute with other ops: {', '.join(OPS)} (default: the recorded ones)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from lmserve.model.adapters import open_adapter
    from lmserve.model.recording import Recording, replay

    changes = {name: value for name in ("device", "ops") if (value := getattr(arguments, name)) is not None}
    try:
        recording = Recording(arguments.file)
        header = recording.header
        checkpoint = header.open(arguments.model or Path(header.model))
        runner = header.load(checkpoint, **changes)
        replayed = replay(recording, runner, lambda path: open_adapter(path, checkpoint, max_rank=MOST_RANK))
    except LmserveError as error:
        raise CommandError(str(error)) from error
    for each in replayed.differences[:MOST_SHOWN]:
        print(f"step {each.step}, row {each.row}: token {each.recorded} was recorded, but {each.found} was sampled now")
    same = replayed.rows - len(replayed.differences)
    print(f"{replayed.steps} steps: {same} of {replayed.rows} tokens are the same")
    return 1 if replayed.differences else 0
