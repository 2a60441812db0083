"""`lmserve serve`: flags to a `ServeConfig`, then the server."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lmserve.cli.aliases import translated
from lmserve.cli.errors import CommandError
from lmserve.cli.settings import fill
from lmserve.config import (
    AGENT_SESSIONS,
    DTYPES,
    GENERATION_CONFIGS,
    GUIDED_WHITESPACES,
    KV_DTYPES,
    LOG_LEVELS,
    OPS,
    POLICIES,
    QUANTIZE,
    REASONING_PARSERS,
    REQUEST_LOGS,
    SESSION_FSYNCS,
    TOOL_PARSERS,
    USER_SPECIAL_TOKENS,
    WORKERS,
    ConfigError,
    ServeConfig,
    format_size,
    parse_disk_tier,
    parse_size,
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
    parser.add_argument("port_positional", metavar="PORT", nargs="?", type=_integer, help="same as --port")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every flag of `serve`. A default of None is left to `ServeConfig`."""
    default = ServeConfig()
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help='read settings from this TOML file; its keys are the names of the flags (max-body = "1MiB"); a '
        "flag overrides its environment variable (LMSERVE_MAX_BODY), and the variable overrides the "
        "file (default: none)",
    )
    group = parser.add_argument_group("HTTP")
    group.add_argument("--host", metavar="HOST", help=f"address to listen on (default: {default.host})")
    group.add_argument(
        "--port", metavar="PORT", type=_integer, help=f"port to listen on; 0 is any free port (default: {default.port})"
    )
    group.add_argument(
        "--api-key",
        dest="api_keys",
        metavar="KEY",
        action="append",
        help="require this key; repeatable; /health and the pages need no key; keys share no sessions and "
        "no prefix cache (default: none)",
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        type=Path,
        help="read more keys from this file, one per line; # begins a comment (default: none)",
    )
    group.add_argument(
        "--keys",
        metavar="FILE",
        type=Path,
        help="read keys with weights and limits from this TOML file; see docs/keys.md (default: none)",
    )
    group.add_argument(
        "--max-body",
        metavar="SIZE",
        type=_size,
        help=f"largest request body, such as 16MiB (default: {format_size(default.max_body)})",
    )
    group.add_argument(
        "--cors-origin",
        dest="cors_origins",
        metavar="ORIGIN",
        action="append",
        help="allow pages of this origin (https://example.org, or *) to call the API; repeatable (default: none)",
    )
    group.add_argument(
        "--allowed-host",
        dest="allowed_hosts",
        metavar="NAME",
        action="append",
        help="accept this name in the Host header, in addition to localhost; * accepts any name; repeatable "
        "(default: any name; if the server has no keys and listens on 127.0.0.1, only localhost, so "
        "that no web page can reach it)",
    )
    group.add_argument(
        "--tls-cert",
        metavar="FILE",
        type=Path,
        help="serve HTTPS with this certificate and its chain, in PEM; needs --tls-key (default: HTTP)",
    )
    group.add_argument(
        "--tls-key", metavar="FILE", type=Path, help="private key of the certificate, in PEM (default: none)"
    )
    group.add_argument(
        "--grace",
        metavar="SECONDS",
        type=_number,
        help=f"how long running turns may take to finish after the server is told to stop (default: {default.grace:g})",
    )
    group.add_argument(
        "--request-log",
        metavar="FORM",
        choices=REQUEST_LOGS,
        help=f"log one line per request to stderr: {', '.join(REQUEST_LOGS)} (default: {default.request_log})",
    )
    group.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        help="send a trace of each request to this OpenTelemetry collector by OTLP over HTTP, such as "
        "http://127.0.0.1:4318; needs lmserve[otel] (default: OTEL_EXPORTER_OTLP_ENDPOINT; if it is "
        "unset, no traces)",
    )
    group.add_argument(
        "--record",
        metavar="FILE",
        type=Path,
        help="record every step of the model in this file, for lmserve replay; the file contains the tokens "
        "of all clients (default: no recording)",
    )
    levels = f"lowest level of messages to log: {', '.join(LOG_LEVELS)} (default: {default.log_level})"
    group.add_argument("--log-level", metavar="LEVEL", choices=LOG_LEVELS, help=levels)

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="[NAME=]MODEL",
        action="append",
        help="same as MODEL; repeat it with names to serve several models: the server loads a model when a "
        "request's `model` names it, and requests that name no model get the first one (default: "
        "SmolLM2-135M-Instruct)",
    )
    group.add_argument(
        "--idle-unload",
        metavar="SECONDS",
        type=_number,
        help="load a model when a request asks for it, and unload it after this long without a request; its "
        "sessions are kept (default: 0: a single model is loaded at the start, and one of several is "
        "unloaded only to make room for another)",
    )
    group.add_argument(
        "--served-model-name",
        dest="served_model_names",
        metavar="NAME",
        action="append",
        help="name of the model in requests; repeatable; replies carry the first name (default: from MODEL)",
    )
    group.add_argument(
        "--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto, which is cuda if there is a GPU)"
    )
    group.add_argument("--dtype", metavar="DTYPE", choices=DTYPES, help=f"{', '.join(DTYPES)} (default: auto)")
    group.add_argument(
        "--ops",
        metavar="OPS",
        choices=OPS,
        help="what computes the model: torch, cpu (lmserve's own kernels, for decoders), or auto (default: auto)",
    )
    group.add_argument(
        "--quantize",
        metavar="FORMAT",
        choices=QUANTIZE,
        help="format of the weights for the cpu kernels: auto (as stored), none (fp32), q8, q4 (default: auto)",
    )
    group.add_argument(
        "--kv-dtype",
        metavar="DTYPE",
        choices=KV_DTYPES,
        help="format of the KV cache for the cpu kernels: auto, fp32, fp16, int8 (default: auto, which is fp16)",
    )
    group.add_argument(
        "--threads",
        metavar="THREADS",
        type=_integer,
        help="number of threads that compute on the CPU (default: the number of cores that the process may use)",
    )
    group.add_argument(
        "--worker",
        metavar="WHERE",
        choices=WORKERS,
        help="compute the model in a thread of the server, or in a process whose crash the server survives: thread or "
        f"process; see docs/workers.md (default: {default.worker})",
    )
    group.add_argument(
        "--weights-cache",
        metavar="WHERE",
        help="keep the weights, packed for the cpu kernels, in a file that later starts map and share: auto (beside "
        "the model, or in the cache folder where that cannot be written), off, or a folder; see docs/cpu.md "
        f"(default: {default.weights_cache})",
    )
    group.add_argument(
        "--max-model-len",
        metavar="TOKENS",
        type=_integer,
        help="context length (history, prompt and answer) (default: the model's context length)",
    )

    group = parser.add_argument_group("answers")
    group.add_argument(
        "--user-special-tokens",
        metavar="WHAT",
        choices=USER_SPECIAL_TOKENS,
        help="how to read the text of special tokens in messages of users and tools: escape (as plain text) "
        f"or allow (as special tokens) (default: {default.user_special_tokens})",
    )
    group.add_argument(
        "--tool-parser",
        metavar="FORMAT",
        help=f"format in which the model writes function calls: {', '.join(TOOL_PARSERS)} (default: auto, by "
        "the chat template)",
    )
    group.add_argument(
        "--reasoning-parser",
        metavar="FORMAT",
        help=f"format in which the model writes thoughts: {', '.join(REASONING_PARSERS)} (default: auto, by "
        "the chat template)",
    )
    group.add_argument(
        "--guided-whitespace",
        metavar="KIND",
        choices=GUIDED_WHITESPACES,
        help="white space in JSON answers that follow a schema: compact (none) or free (the model decides) "
        f"(default: {default.guided_whitespace})",
    )

    group.add_argument(
        "--generation-config",
        metavar="SOURCE",
        choices=GENERATION_CONFIGS,
        help="sampling defaults for requests that set none: model (from its generation_config.json or GGUF "
        f"file) or none (temperature 1, no limits) (default: {default.generation_config})",
    )

    group = parser.add_argument_group("scheduler")
    sequences = f"largest number of sequences in a step (default: {default.max_batch})"
    group.add_argument("--max-batch", metavar="SEQUENCES", type=_integer, help=sequences)
    group.add_argument(
        "--max-batch-tokens",
        metavar="TOKENS",
        type=_integer,
        help="largest number of tokens in a step (default: by device)",
    )
    group.add_argument(
        "--max-queue",
        metavar="REQUESTS",
        type=_integer,
        help=f"largest number of waiting requests; the server refuses more with 429 (default: {default.max_queue})",
    )
    group.add_argument(
        "--policy",
        metavar="POLICY",
        choices=POLICIES,
        help="which waiting request runs first: fair (by priority, then the key that has got the least for "
        "its weight, then by arrival) or fcfs (by arrival) (default: fair)",
    )
    group.add_argument(
        "--speculate",
        metavar="TOKENS",
        type=_integer,
        help="where a text repeats itself, guess up to this many next tokens and check them in one step; "
        "answers stay the same; see docs/speculation.md (default: 0, which is off)",
    )
    group.add_argument(
        "--kv-memory",
        metavar="SIZE",
        type=_size,
        help="memory for the KV cache, such as 2GiB (default: by free memory)",
    )
    group.add_argument(
        "--state-slots",
        metavar="N",
        type=int,
        help="number of recurrent states that a hybrid model has memory for: those of running sequences, "
        "and snapshots; see docs/hybrids.md (default: by free memory)",
    )
    group.add_argument(
        "--state-every",
        metavar="TOKENS",
        type=int,
        help="number of tokens between two snapshots of a recurrent state; the server also takes one at the end "
        f"of each turn (default: {default.state_every})",
    )
    group.add_argument(
        "--kv-host-memory",
        metavar="SIZE",
        type=_size,
        help="host memory for KV blocks that leave the KV cache; see docs/kv-tiers.md (default: 0, which is none)",
    )
    group.add_argument(
        "--kv-disk",
        metavar="DIR,SIZE",
        type=_disk_tier,
        help="a folder that keeps what was computed, KV blocks and states, beyond a restart, and the size that it may "
        "take, such as /var/kv,100GiB; see docs/kv-tiers.md (default: none)",
    )
    group.add_argument(
        "--state-memory",
        metavar="SIZE",
        type=_size,
        help="host memory for recurrent states that leave their slots (default: 0, which is none)",
    )
    group.add_argument(
        "--state-disk",
        metavar="SIZE",
        type=_size,
        help="of a hybrid model with --session-dir and without --kv-disk: what states and KV blocks may take in that "
        f"folder; 0: none are kept (default: {format_size(default.state_disk)})",
    )
    group.add_argument(
        "--gpu-memory-fraction",
        metavar="FRACTION",
        type=float,
        help="share of a GPU's free memory for weights, KV cache and steps together (default: "
        f"{default.gpu_memory_fraction})",
    )
    group.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_const",
        const=False,
        help="compute every prompt anew, even if its beginning is in the KV cache (default: reuse what is cached)",
    )
    group.add_argument(
        "--share-prefix-cache",
        action="store_const",
        const=True,
        help="share one prefix cache between all API keys; timing can then leak the prompts of other keys "
        "(default: one cache per key)",
    )

    group = parser.add_argument_group("sessions")
    group.add_argument(
        "--session-dir",
        metavar="DIR",
        type=Path,
        help="keep sessions in a log in this folder; they then survive a restart (default: in memory only)",
    )
    group.add_argument(
        "--session-fsync",
        metavar="WHEN",
        choices=SESSION_FSYNCS,
        help="when to sync the session log to disk: always (before a turn's reply ends), interval (once a "
        "second) or never; it matters only if the machine loses power: a killed server loses no turn "
        f"(default: {default.session_fsync})",
    )
    group.add_argument(
        "--agent-sessions",
        metavar="WHETHER",
        choices=AGENT_SESSIONS,
        help="on: the session headers of agents and prompt_cache_key name a conversation, which the server "
        f"continues token for token; off: the server ignores them (default: {default.agent_sessions})",
    )
    group.add_argument(
        "--session-ttl",
        metavar="SECONDS",
        type=_number,
        help="drop a session after this long without a turn (default: 0, which is never)",
    )
    group.add_argument(
        "--max-sessions",
        metavar="SESSIONS",
        type=_integer,
        help="largest number of sessions; if there are more, the least recently used idle one is dropped "
        f"(default: {default.max_sessions})",
    )


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


REPEATABLE: Final = ("api_keys", "served_model_names", "cors_origins", "allowed_hosts")


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


def _argument(convert: Callable[[str], T], what: str) -> Callable[[str], T]:
    """`convert`, with an error that says what was expected and given."""

    def parse(text: str) -> T:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{what} expected, but {text!r} was given") from error

    return parse


_integer = _argument(int, "a whole number")
_number = _argument(float, "a number")
_disk_tier = _argument(parse_disk_tier, "a folder and a size such as /var/kv,100GiB")
_size = _argument(parse_size, "a size such as 2GiB, 512MiB or a number of bytes")
