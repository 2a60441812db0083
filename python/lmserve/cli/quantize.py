"""`lmserve quantize`: a GGUF file's weights in fewer bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lmserve.cli.errors import CommandError
from lmserve.cli.serve_options import integer

if TYPE_CHECKING:
    from lmserve.cli.types import Commands

MAX_THREADS: Final = 1024
TYPES: Final = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
DESCRIPTION: Final = """\
Round the weights of a GGUF file in F32, F16 or BF16 to fewer bits, and write another GGUF file. Each type is the
mixture that llama.cpp calls so; llama.cpp and other programs read the file, too. Where the rows of a weight are not
a multiple of 256 long, Q4_1, Q5_1 and Q8_0 stand for Q4_K, Q5_K and Q6_K.
"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "quantize",
        help="round the weights of a GGUF file to fewer bits",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "source", metavar="IN", help="the model, as for serve: a GGUF file, the first of several, or a name"
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--type", choices=TYPES, default=TYPES[0], help=f"what to write (default: {TYPES[0]})")
    parser.add_argument("--threads", metavar="THREADS", type=integer, help="threads that compute (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="write OUT also where there is such a file")
    parser.add_argument(
        "--allow-requantize",
        action="store_true",
        help="take IN also if its weights are rounded already",
    )


def run(arguments: argparse.Namespace) -> int:
    from lmserve.cli.models import tell
    from lmserve.cli.progress import DownloadProgress
    from lmserve.config import format_size
    from lmserve.errors import LmserveError
    from lmserve.model.device import usable_cores
    from lmserve.model.errors import CheckpointError
    from lmserve.quantize import MIXTURES, QuantizeError, quantize
    from lmserve.source import SourceError, find_model

    target: Path = arguments.target
    if arguments.threads is not None and not 1 <= arguments.threads <= MAX_THREADS:
        raise CommandError(f"--threads must lie in [1, {MAX_THREADS}], but {arguments.threads} was given")
    try:
        source = find_model(arguments.source, DownloadProgress(arguments.source), tell).path
    except (SourceError, LmserveError) as error:
        raise CommandError(str(error)) from error
    if source.is_dir():
        raise CommandError(
            f"{source} is a folder, and quantize reads GGUF files: convert it with llama.cpp's convert_hf_to_gguf.py, "
            "or serve it with --quantize q4, which rounds as it loads"
        )
    if target.exists() and (not arguments.overwrite or target.samefile(source)):
        hint = "another name" if target.samefile(source) else "--overwrite"
        raise CommandError(f"{target} exists; use {hint}")
    try:
        done = quantize(
            source,
            target,
            MIXTURES[arguments.type],
            DownloadProgress(target.name, "Writing"),
            threads=arguments.threads or usable_cores(),
            again=arguments.allow_requantize,
        )
    except (QuantizeError, CheckpointError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        # numpy says how much of an array was written, and not why no more.
        reason = error.strerror or "the disk took only a part of what was written"
        raise CommandError(f"{target} cannot be written: {reason}") from error
    bits = 8 * done.bytes_after / done.weights
    print(f"{target}: {format_size(done.bytes_after)} of {format_size(done.bytes_before)}, {bits:.2f} bits a weight")
    return 0
