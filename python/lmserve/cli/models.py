"""`lmserve pull`, `list`, `show` and `rm`: the models on this machine, by name."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from lmserve.cli.errors import CommandError
from lmserve.cli.plan_view import plan_lines
from lmserve.cli.progress import DownloadProgress
from lmserve.cli.terminal import UNDER_VALUES, fitted
from lmserve.config import ServeConfig, format_size

if TYPE_CHECKING:
    from lmserve.cli.types import Commands
    from lmserve.stored import StoredModel

NAMES: Final = """\
NAME is a model on the hub (owner/name, owner/name:Q4_K_M, hf.co/owner/name), a short name (qwen3:4b; lmserve list
--known shows all), the URL of a GGUF file, or a bundled model. If a repository has several GGUF files, lmserve takes
the largest one that this machine has memory for, by the arithmetic of lmserve plan.
"""


def add_parser(commands: Commands) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    text = "fetch a model into the cache and print its path"
    pull = commands.add_parser("pull", aliases=["fetch"], help=text, description=NAMES, formatter_class=raw)
    pull.add_argument("name", metavar="NAME", nargs="?", help="the model (default: SmolLM2-135M-Instruct)")
    pull.set_defaults(run=run_pull)

    text = "list the models in the cache"
    listing = commands.add_parser("list", aliases=["ls"], help=text, description=f"{text.capitalize()}.")
    listing.add_argument("--known", action="store_true", help="list the short names and their models instead")
    listing.set_defaults(run=run_list)

    text = "describe a model and the memory that it needs"
    show = commands.add_parser("show", help=text, description=NAMES, formatter_class=raw)
    show.add_argument("name", metavar="NAME", help="the model, or a path")
    show.set_defaults(run=run_show)

    text = "remove models from the cache"
    remove = commands.add_parser("rm", help=text, description=f"{text.capitalize()}.")
    remove.add_argument(
        "names",
        metavar="NAME",
        nargs="+",
        help="a model; a name without a quantization removes all files of its repository",
    )
    remove.set_defaults(run=run_remove)


def run_pull(arguments: argparse.Namespace) -> int:
    from lmserve.errors import LmserveError
    from lmserve.source import SourceError, find_model

    try:
        source = find_model(arguments.name, DownloadProgress(arguments.name or "the default model"), tell)
    except (SourceError, LmserveError) as error:
        raise CommandError(str(error)) from error
    print(source.path)
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    if arguments.known:
        from lmserve.hub.names import short_names

        rows = [
            (f"{name}:{size}" + (f", {name}" if sizes["default"] == size else ""), target)
            for name, sizes in short_names().items()
            for size, target in sizes.items()
            if size != "default"
        ]
        _table(("NAME", "MODEL"), rows)
        return 0
    from lmserve.stored import stored_models

    models = sorted(stored_models(), key=lambda model: -model.changed)
    _table(("NAME", "SIZE", "FETCHED"), [(m.names[0], format_size(m.size), _day(m.changed)) for m in models])
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    from lmserve.engine.load import ModelPlan
    from lmserve.errors import LmserveError
    from lmserve.loading import load
    from lmserve.source import SourceError, headers_of_model

    try:
        with headers_of_model(arguments.name, DownloadProgress(arguments.name), tell) as source:
            plan = load(lambda: ModelPlan(source.path, ServeConfig(), source.published))
    except (SourceError, LmserveError) as error:
        raise CommandError(str(error)) from error
    checkpoint = plan.checkpoint
    kinds: dict[str, int] = {}
    elements = 0
    for tensor in checkpoint.tensors.values():
        count = 1
        for extent in tensor.shape:
            count *= extent
        kinds[tensor.dtype] = kinds.get(tensor.dtype, 0) + count
        elements += count
    shares = (f"{kind} {100 * count / elements:.0f} %" for kind, count in sorted(kinds.items(), key=lambda k: -k[1]))
    lines = [f"Family    {checkpoint.family.name}, {elements / 1e6:.0f} million parameters, {', '.join(shares)}"]
    template = "from the model" if checkpoint.chat_template else "none: the model continues texts but cannot chat"
    lines += [f"Template  {template}", *plan_lines(plan, source.names)]
    for line in lines:
        print(fitted(line, sys.stdout, UNDER_VALUES))
    return 0


def run_remove(arguments: argparse.Namespace) -> int:
    from lmserve.hub.errors import HubError
    from lmserve.stored import find_stored

    found: list[StoredModel] = []
    for name in arguments.names:
        try:
            models = find_stored(name)
        except HubError as error:
            raise CommandError(str(error)) from error
        if not models:
            raise CommandError(f"{name} is not in the cache; lmserve list shows the models that are")
        found += models
    for model in found:
        try:
            print(f"{model.names[0]}: {format_size(model.remove())} removed")
        except FileNotFoundError:
            # It was part of one that is gone already.
            continue
        except OSError as error:
            raise CommandError(f"{model.names[0]} cannot be removed: {error}") from error
    return 0


def tell(line: str) -> None:
    """What was chosen for the user goes where the progress goes."""
    print(fitted(line, sys.stderr), file=sys.stderr, flush=True)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head) - 1)]
    for row in (head, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print(fitted("  ".join([*cells, row[-1]]), sys.stdout, sum(widths) + 2 * len(widths)))
