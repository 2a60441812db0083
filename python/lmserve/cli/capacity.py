"""`lmserve simulate --trace`: what a trace of requests comes to on servers of given sizes and speed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lmserve.cli.errors import CommandError
from lmserve.errors import LmserveError

# Flags that override a size of the step model's server.
SIZES: Final = ("max_batch", "max_batch_tokens", "max_model_len", "max_queue")


def add_options(parser: argparse.ArgumentParser, integer: Callable[[int, int], Callable[[str], int]]) -> None:
    """The flags of the capacity mode; `integer(low, high)` makes a bounded argument."""
    group = parser.add_argument_group(
        "capacity",
        "Instead, predict how servers of given sizes and speed handle a trace of requests. The trace "
        "is a file in JSON lines with arrival (in seconds), prompt_tokens, output_tokens and, "
        "optionally, session and shared_tokens.",
    )
    group.add_argument("--trace", metavar="FILE", type=Path, help="the trace to run (default: none)")
    group.add_argument(
        "--step-model",
        metavar="FILE",
        help="time that a step takes: a file that lmserve bench --fit has written, or "
        "base_ms=4,decode_ms=1.2,... (default: none)",
    )
    group.add_argument(
        "--replicas",
        metavar="N",
        type=integer(1, 100_000),
        default=1,
        help="number of servers; a session stays on one server, and other requests go to each in turn (default: 1)",
    )
    for size in SIZES:
        flag = "--" + size.replace("_", "-")
        what = "as for lmserve serve (default: as on the step model's server)"
        group.add_argument(flag, metavar="N", type=integer(1, 10**7), help=what)
    group.add_argument(
        "--kv-tokens",
        metavar="N",
        type=integer(1, 2**31),
        help="number of tokens that fit into the KV cache (default: as on the step model's server)",
    )
    group.add_argument("--json", metavar="FILE", type=Path, help="write the results to this file (default: none)")
    group.add_argument("--plot", metavar="FILE.svg", type=Path, help="draw the timeline into this file (default: none)")


def refuse(arguments: argparse.Namespace) -> None:
    """Raises CommandError (exit code 2) for a flag of this mode where there is no trace."""
    for name in ("step_model", "kv_tokens", "json", "plot", *SIZES):
        if getattr(arguments, name) is not None:
            raise CommandError(f"--{name.replace('_', '-')} needs --trace", exit_code=2)
    if arguments.replicas != 1:
        raise CommandError("--replicas needs --trace", exit_code=2)


def run(arguments: argparse.Namespace) -> int:
    """Simulate, print, and write what was asked for."""
    import msgspec

    from lmserve.capacity.report import plot, simulate, table
    from lmserve.capacity.setup import read_step_model

    if arguments.step_model is None:
        raise CommandError("--trace needs --step-model", exit_code=2)
    try:
        step_model, sizes = read_step_model(arguments.step_model)
        trace = arguments.trace.read_bytes()
    except ValueError as error:
        raise CommandError(f"--step-model: {error}", exit_code=2) from error
    except OSError as error:
        raise CommandError(f"--trace {arguments.trace} cannot be read: {error.strerror}", exit_code=2) from error
    given = {size: getattr(arguments, size) for size in SIZES if getattr(arguments, size) is not None}
    if arguments.kv_tokens is not None:
        given["num_blocks"] = -(-arguments.kv_tokens // sizes.block_size)
    sizes = msgspec.structs.replace(sizes, **given)
    started = time.monotonic()
    try:
        capacity = simulate(trace, step_model, sizes, arguments.replicas)
    except LmserveError as error:
        raise CommandError(str(error)) from error
    print(table(capacity))
    print(f"\nsimulated in {time.monotonic() - started:.1f} s")
    try:
        if arguments.json is not None:
            arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(capacity), indent=2) + b"\n")
        if arguments.plot is not None:
            replicas = f"{arguments.replicas} replica" + ("s" if arguments.replicas > 1 else "")
            subtitle = f"{replicas}, {sizes.num_blocks * sizes.block_size:,} tokens of KV cache each"
            drawing = plot(f"{arguments.trace.name} on {replicas}", subtitle, capacity)
            arguments.plot.write_text(drawing, "utf-8")
    except OSError as error:
        raise CommandError(f"{error.filename} cannot be written: {error.strerror}") from error
    return 0
