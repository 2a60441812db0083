"""`lmserve serve`: flags to a `ServeConfig`, then the server."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lmserve.cli.aliases import translated
from lmserve.cli.errors import CommandError
from lmserve.cli.serve_options import add_options, integer
from lmserve.cli.settings import fill
from lmserve.config import (
    ConfigError,
    ServeConfig,
)
from lmserve.keys import KeysError, read_keys

if TYPE_CHECKING:
    from lmserve.cli.types import Commands

T = TypeVar("T")

DESCRIPTION = """\
Serve a model over HTTP: OpenAI's API, Anthropic's API, and LMDeploy's /generate with its sessions. The API docs are
at /docs.

MODEL is a GGUF file, a Hugging Face folder (config.json, tokenizer.json, *.safetensors), a model on the hub
(owner/name, owner/name:Q4_K_M, hf.co/owner/name), a short name (qwen3:4b; lmserve list --known shows all), the URL of
a GGUF file, SmolLM2-135M-Instruct or all-MiniLM-L6-v2. The default is SmolLM2-135M-Instruct.
"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.common = (
        "--host",
        "--port",
        "--api-key",
        "--device",
        "--threads",
        "--max-model-len",
        "--max-batch",
        "--kv-memory",
        "--session-dir",
        "--config",
    )
    parser.set_defaults(run=run)
    _add_arguments(parser)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_positional", metavar="MODEL", nargs="?", help="the model to serve; see above")
    parser.add_argument("host_positional", metavar="HOST", nargs="?", help="same as --host")
    parser.add_argument("port_positional", metavar="PORT", nargs="?", type=integer, help="same as --port")
    add_options(parser)


def config_of(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ServeConfig:
    """The settings by command line, environment and file. Raises CommandError (exit code 2) if they cannot be."""
    given = dict(vars(arguments))
    for setting in ("host", "port"):
        given[setting] = _one_of(setting, given[f"{setting}_positional"], given[setting])
    flags = argparse.ArgumentParser(add_help=False)
    add_options(flags)
    if given["model_positional"] is not None and given["model"] is None:
        # So that neither the environment nor the file names another one.
        given["model"] = [given["model_positional"]]
    origins = fill(given, flags, environment, (*REPEATABLE, "model"))
    given["model"], given["models"] = _models(given["model_positional"], given["model"] or [], origins.of("model"))
    values = {setting.name: given[setting.name] for setting in fields(ServeConfig)}
    for setting in REPEATABLE:
        values[setting] = tuple(given[setting] or ())
    if given["api_key_file"] is not None:
        values["api_keys"] += tuple(_read_keys(given["api_key_file"], origins.of("api_key_file")))
    try:
        if given["keys"] is not None:
            values["keys"] = read_keys(given["keys"])
        return ServeConfig(**{setting: value for setting, value in values.items() if value is not None})
    except KeysError as error:
        raise CommandError(f"{origins.of('keys')} {given['keys']} {error}", exit_code=2) from error
    except ConfigError as error:
        raise CommandError(f"{origins.of(error.setting)} {error}", exit_code=2) from error


REPEATABLE: Final = ("api_keys", "loras", "served_model_names", "cors_origins", "allowed_hosts")


def config_from(flags: Sequence[str]) -> ServeConfig:
    """The settings that `lmserve serve` with these flags would run with."""
    parser = argparse.ArgumentParser(prog="lmserve serve")
    _add_arguments(parser)
    return config_of(parser.parse_args(translated(flags)))


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    # What imports make stays: to look for garbage in it takes a tenth of their time.
    gc.disable()
    from lmserve.cli.server import serve_model

    gc.enable()
    serve_model(config)
    return 0


def _models(positional: str | None, flags: list[str], origin: str) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """One model, or several with names."""
    # A path may have an equals sign.
    named = [
        (flag.split("=", 1)[0], flag.split("=", 1)[1]) for flag in flags if "=" in flag and not Path(flag).exists()
    ]
    plain = {*(flag for flag in flags if "=" not in flag or Path(flag).exists())}
    if positional is not None:
        if named or plain - {positional}:
            raise CommandError(
                f"{origin} {flags[0]} contradicts MODEL {positional}: give only one of them", exit_code=2
            )
        return positional, ()
    if len(plain) > 1 or (plain and named):
        raise CommandError(f"{origin}: each of several models needs a name: --model NAME={min(plain)}", exit_code=2)
    return (plain.pop(), ()) if plain else (None, tuple(named))


def _one_of(setting: str, positional: Any, flag: Any) -> Any:
    if positional is not None and flag is not None and positional != flag:
        raise CommandError(
            f"--{setting} {flag} contradicts {setting.upper()} {positional}: give only one of them", exit_code=2
        )
    return positional if flag is None else flag


def _read_keys(path: Path, origin: str) -> list[str]:
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{origin} {path} cannot be read: {error}", exit_code=2) from error
    keys = [line for line in lines if line]
    if not keys:
        # An empty file would leave the server open to all.
        raise CommandError(f"{origin} {path} contains no key", exit_code=2)
    return keys
