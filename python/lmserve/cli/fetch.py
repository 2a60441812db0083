"""`lmserve fetch`: put a bundled model into the cache, for a machine that will be offline later."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lmserve.assets import ASSETS, SMOLLM2, AssetError
from lmserve.assets import fetch as fetch_asset
from lmserve.cli.errors import CommandError
from lmserve.cli.progress import DownloadProgress

if TYPE_CHECKING:
    from lmserve.cli.types import Commands


def add_parser(commands: Commands) -> None:
    names = ", ".join(ASSETS)
    text = "fetch a bundled model into the cache and print its path"
    parser = commands.add_parser("fetch", help=text, description=f"{text.capitalize()}. Models: {names}.")
    help_text = f"which model (default: {SMOLLM2.name})"
    parser.add_argument("name", metavar="NAME", nargs="?", choices=list(ASSETS), default=SMOLLM2.name, help=help_text)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    asset = ASSETS[arguments.name]
    try:
        print(fetch_asset(asset, DownloadProgress(asset.name)))
    except AssetError as error:
        raise CommandError(str(error)) from error
    return 0
