"""`lmserve plan`: what a model takes in memory and what fits beside it, from its configuration and headers alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from lmserve.cli.errors import CommandError
from lmserve.cli.serve import add_options, config_of
from lmserve.config import format_size

if TYPE_CHECKING:
    from lmserve.cli.types import Commands
    from lmserve.engine.load import ModelPlan

DESCRIPTION: Final = """\
Say what `lmserve serve` with the same MODEL and flags would take: weights, KV cache, and how many sessions of a given
length the cache holds at a time. Reads the configuration and the files' headers, and loads nothing.
"""

LENGTHS: Final = (512, 2048, 4096)  # tokens of a session, beside the longest that there can be


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="say what a model takes in memory, without loading it",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, host_positional=None, port_positional=None)
    parser.add_argument("model_positional", metavar="MODEL", nargs="?", help="the model, as for serve")
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    from lmserve.cli.progress import DownloadProgress
    from lmserve.engine.load import ModelPlan
    from lmserve.errors import LmserveError
    from lmserve.source import SourceError, find_model

    try:
        source = find_model(config.model, DownloadProgress("the model"))
        plan = ModelPlan(source.path, config, source.published)
    except (SourceError, LmserveError) as error:
        raise CommandError(str(error)) from error
    for line in plan_lines(plan, config.served_model_names or source.names):
        print(line)
    return 0


def plan_lines(plan: ModelPlan, names: tuple[str, ...]) -> list[str]:
    """The plan for a person, a line each. `names`: those the model is served under."""
    memory = plan.memory
    also = f" (also as {', '.join(names[1:])})" if len(names) > 1 else ""
    weights = format_size(memory.weight_bytes)
    kernels = "cpu kernels" if memory.ops == "cpu" else memory.dtype
    if memory.ops == "cpu":
        weights += f" ({memory.quantize or 'as stored'})"
    lines = [
        f"Model     {names[0]}{also}, from {plan.checkpoint.path}",
        f"Device    {memory.device}, {kernels}, weights {weights}, context {memory.max_model_len} tokens",
    ]
    lines += [f"Note      {note}" for note in plan.checkpoint.notes]
    if plan.checkpoint.kind == "generate":
        defaults = f"{plan.defaults} ({plan.defaults.source})" if plan.defaults.given() else "temperature 1"
        lines.append(f"Sampling  where a request names none: {defaults}")
    if memory.num_blocks:
        tokens = memory.num_blocks * memory.block_size
        blocks = f"{memory.num_blocks} blocks of {memory.block_size} tokens"
        each = f"{format_size(memory.kv_bytes_per_token)} a token"
        lines.append(f"KV cache  {blocks}: {tokens} tokens, {each}, {format_size(memory.kv_bytes)} in all")
        lengths = [length for length in LENGTHS if length < memory.max_model_len] + [memory.max_model_len]
        fit = [f"{memory.num_blocks // -(-length // memory.block_size)} of {length} tokens" for length in lengths]
        lines.append(f"Sessions  in the cache at a time: {', or '.join(fit)}")
    if speculate := plan.options.speculate:
        graphs = "" if memory.device == "cpu" else "; a step with drafts replays no CUDA graph"
        rows = f"{memory.max_rows} sampled rows a step with them"
        lines.append(f"Drafts    up to {speculate} tokens of a sequence, {rows}{graphs}")
    return lines
