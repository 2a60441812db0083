"""`lmserve bench`: measure an OpenAI-compatible server, this one or another."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lmserve.bench.workload import WORKLOADS
from lmserve.cli.bounded import bounded
from lmserve.cli.errors import CommandError
from lmserve.cli.models import tell
from lmserve.cli.progress import DownloadProgress

if TYPE_CHECKING:
    from lmserve.cli.types import Commands

DESCRIPTION = """\
Measure a server over HTTP: output and total tokens per second, time to first token, time between tokens. Requests are
greedy and set ignore_eos, and the usage of each reply must be exactly the number of tokens asked for. Exits with 1 if a
request fails.

workloads:
"""


def add_parser(commands: Commands) -> None:
    names = "\n".join(f"  {workload.name:<14} {workload.description}" for workload in WORKLOADS.values())
    parser = commands.add_parser(
        "bench",
        help="measure an OpenAI-compatible server",
        description=DESCRIPTION + names,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.common = ("--workload", "--concurrency", "--requests", "--model", "--api-key", "--json", "--plot", "--trace")
    parser.brief = DESCRIPTION.partition("\n\n")[0] + f" Workloads: {', '.join(WORKLOADS)}."
    parser.set_defaults(run=run)
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every argument of `bench`."""
    parser.add_argument("url", metavar="URL", nargs="?", help="the server, such as http://127.0.0.1:23333")
    parser.add_argument(
        "--workload",
        dest="workloads",
        metavar="NAME[,NAME]",
        type=_workloads,
        default=["mixed"],
        help="workloads to run, or all (default: mixed)",
    )
    parser.add_argument(
        "--concurrency",
        metavar="N[,N]",
        type=_integers(1, 4096),
        help="numbers of concurrent clients; each number is one run (default: by workload)",
    )
    parser.add_argument(
        "--requests", metavar="N", type=bounded(1, 10**6), help="number of requests (default: by workload)"
    )
    parser.add_argument(
        "--output-tokens", metavar="N", type=bounded(1, 10**6), help="length of each reply (default: by workload)"
    )
    parser.add_argument(
        "--turns",
        metavar="N",
        type=bounded(1, 1000),
        help="turns of each conversation (default: 20 of the workload agent, 6 of chat)",
    )
    parser.add_argument(
        "--resend-history",
        action="store_true",
        help="in the workload chat, send the whole history with each turn, as other servers need it",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="model to request (default: the first one that the server lists)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="API key for the server (default: $LMSERVE_API_KEY)")
    parser.add_argument(
        "--seed",
        metavar="N",
        type=bounded(0, 2**63 - 1),
        help="seed of the random prompts (default: a new one, so that no server has the prompts in its cache)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=bounded(1, 10**6),
        default=600,
        help="time limit for a request (default: 600)",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="instead of a workload, send the requests of this trace at their times; see lmserve simulate "
        "(default: none)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results to this file (default: none)")
    parser.add_argument("--plot", metavar="FILE.svg", type=Path, help="draw the results into this file (default: none)")

    group = parser.add_argument_group("step model", "Instead of a server, measure this machine for lmserve simulate.")
    group.add_argument(
        "--fit",
        metavar="FILE.json",
        type=Path,
        help="time the steps of a model, fit a step model to them, and write it to this file (default: none)",
    )
    group.add_argument(
        "--serve",
        metavar="ARGUMENTS",
        default="",
        help="arguments for lmserve serve, in one string (default: none, which is the default model)",
    )


def _integers(low: int, high: int) -> Callable[[str], list[int]]:
    parse = bounded(low, high)
    return lambda text: [parse(part) for part in text.split(",")]


def _workloads(text: str) -> list[str]:
    if text == "all":
        return list(WORKLOADS)
    names = text.split(",")
    for name in names:
        if name not in WORKLOADS:
            raise argparse.ArgumentTypeError(f"a workload is one of {', '.join(WORKLOADS)}, but {name!r} was given")
    return names


def run(arguments: argparse.Namespace) -> int:
    if (arguments.url is None) == (arguments.fit is None):
        raise CommandError("give either a URL or --fit", exit_code=2)
    try:
        return _run_fit(arguments) if arguments.url is None else _run_campaign(arguments)
    except OSError as error:
        raise CommandError(f"{error.filename} cannot be written: {error.strerror}") from error


def _run_campaign(arguments: argparse.Namespace) -> int:
    from lmserve.bench.campaign import Campaign, measure
    from lmserve.bench.http import Target
    from lmserve.bench.load import ServerError
    from lmserve.bench.trace import trace_workload
    from lmserve.bench.workload import Sizes
    from lmserve.cli.bench_view import TerminalView

    try:
        target = Target(arguments.url, arguments.api_key or os.environ.get("LMSERVE_API_KEY"))
        trace = None if arguments.trace is None else trace_workload(arguments.trace)
    except ValueError as error:
        raise CommandError(str(error), exit_code=2) from error
    workloads = [WORKLOADS[name] for name in arguments.workloads]
    campaign = Campaign(
        target=target,
        workloads=tuple(workloads if trace is None else [trace]),
        concurrency=tuple(arguments.concurrency or ()) if trace is None else (),
        sizes=Sizes(arguments.output_tokens, arguments.requests, arguments.turns),
        seed=secrets.randbits(48) if arguments.seed is None else arguments.seed,
        model=arguments.model,
        timeout=float(arguments.timeout),
        resend_history=arguments.resend_history,
    )
    try:
        result = measure(campaign, TerminalView(campaign.seed))
    except ServerError as error:
        raise CommandError(str(error)) from error
    if arguments.json is not None:
        arguments.json.write_bytes(result.to_json())
    if arguments.plot is not None:
        arguments.plot.write_text(result.to_svg(), "utf-8")
    return 1 if any(report.errors for report in result.runs) else 0


def _run_fit(arguments: argparse.Namespace) -> int:
    import msgspec

    from lmserve.capacity.fit import measure_fit
    from lmserve.cli import bench_view
    from lmserve.cli.serve import config_from
    from lmserve.engine.load import ModelPlan
    from lmserve.errors import LmserveError
    from lmserve.source import SourceError, find_model

    config = config_from(shlex.split(arguments.serve))
    try:
        source = find_model(config.model, DownloadProgress("the model"), tell)
        plan = ModelPlan(source.path, config, source.published)
        fit = measure_fit(plan, config, bench_view.draw_fit)
    except (SourceError, LmserveError) as error:
        raise CommandError(str(error)) from error
    print(bench_view.fit_table(fit))
    arguments.fit.write_bytes(msgspec.json.format(msgspec.json.encode(fit), indent=2) + b"\n")
    return 0
