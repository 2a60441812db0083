"""`lmserve simulate`: the scheduler, the sessions and the replies under chance, on a virtual clock."""

from __future__ import annotations

import argparse
import secrets
import time
from typing import TYPE_CHECKING

from lmserve import LmserveError, _core
from lmserve.cli import capacity
from lmserve.cli.bounded import bounded
from lmserve.cli.errors import CommandError

if TYPE_CHECKING:
    from lmserve.cli.types import Commands

MAX_SEED = 2**64 - 1


def add_parser(commands: Commands) -> None:
    proof = (
        "Test the core on this machine with random clients, faults and kills. The same seed repeats a run bit for bit."
    )
    parser = commands.add_parser(
        "simulate",
        help="test the core, or predict how servers handle a load",
        description=f"{proof} Exits with 1 if an invariant is violated.",
    )
    parser.add_argument(
        "--seed", type=bounded(0, MAX_SEED), metavar="N", help="seed of the run (default: a new one, which is printed)"
    )
    parser.add_argument(
        "--steps",
        type=bounded(1, 10**12),
        metavar="N",
        default=100_000,
        help="number of steps to simulate (default: 100,000)",
    )
    capacity.add_options(parser, bounded)
    parser.set_defaults(run=run)


def _print_counts(counts: dict[str, int]) -> None:
    for name, count in counts.items():
        print(f"{name.replace('_', ' '):>17} {count:>12,}")


def run(arguments: argparse.Namespace) -> int:
    if arguments.trace is not None:
        return capacity.run(arguments)
    capacity.refuse(arguments)
    seed = secrets.randbits(64) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    start = time.monotonic()
    try:
        report = _core.simulate(seed, arguments.steps)
    except LmserveError as error:
        raise CommandError(str(error)) from error
    _print_counts({"worlds": report["worlds"]} | report["counters"])
    print("injected faults:")
    _print_counts(report["faults"])
    print(f"no violation in {time.monotonic() - start:.1f} s; digest {report['digest']:016x}")
    return 0
