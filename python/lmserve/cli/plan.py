"""`lmserve plan`: what a model takes in memory and what fits beside it, from its configuration and headers alone."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lmserve.cli.errors import CommandError
from lmserve.cli.plan_view import plan_lines
from lmserve.cli.serve import config_of
from lmserve.cli.serve_options import add_options
from lmserve.cli.terminal import UNDER_VALUES, fitted

if TYPE_CHECKING:
    from lmserve.cli.types import Commands

DESCRIPTION: Final = """\
Show the memory that `lmserve serve` with the same MODEL and flags would need: weights, KV cache, and how many sessions
of a given length fit into the cache. It reads the configuration and the files' headers and loads nothing. If a GGUF
file on the hub is not in the cache, only its header is fetched.
"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="show how much memory a model needs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.common = ("--device", "--quantize", "--max-model-len", "--max-batch", "--kv-memory", "--config")
    parser.set_defaults(run=run, host_positional=None, port_positional=None)
    parser.add_argument("model_positional", metavar="MODEL", nargs="?", help="the model, as for serve")
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    from lmserve.cli.models import tell
    from lmserve.cli.progress import DownloadProgress
    from lmserve.engine.load import ModelPlan
    from lmserve.errors import LmserveError
    from lmserve.loading import load
    from lmserve.source import SourceError, headers_of_model

    try:
        with headers_of_model(config.model, DownloadProgress("the model"), tell) as source:
            own = config if source.is_whole else replace(config, weights_cache="off")
            plan = load(lambda: ModelPlan(source.path, own, source.published))
    except (SourceError, LmserveError) as error:
        raise CommandError(str(error)) from error
    for line in plan_lines(plan, config.served_model_names or source.names):
        print(fitted(line, sys.stdout, UNDER_VALUES))
    return 0
