"""The flags of `lmserve serve`, in the groups of its help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

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
    ServeConfig,
    format_size,
    parse_disk_tier,
    parse_named_path,
    parse_size,
)

T = TypeVar("T")


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
    _add_http(parser.add_argument_group("HTTP"), default)
    _add_model(parser.add_argument_group("model"), default)
    _add_answers(parser.add_argument_group("answers"), default)
    _add_scheduler(parser.add_argument_group("scheduler"), default)
    _add_sessions(parser.add_argument_group("sessions"), default)


def _add_http(group: argparse._ArgumentGroup, default: ServeConfig) -> None:
    """What listens, who may call, and what is logged."""
    group.add_argument("--host", metavar="HOST", help=f"address to listen on (default: {default.host})")
    group.add_argument(
        "--port", metavar="PORT", type=integer, help=f"port to listen on; 0 is any free port (default: {default.port})"
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


def _add_model(group: argparse._ArgumentGroup, default: ServeConfig) -> None:
    """The model and its memory."""
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
        "--lora",
        dest="loras",
        metavar="NAME=PATH",
        action="append",
        type=_named_path,
        help="load this adapter, a folder as PEFT writes it; requests choose it by its name as `model`; repeatable; "
        "see docs/adapters.md (default: none)",
    )
    group.add_argument(
        "--lora-dir",
        metavar="DIR",
        type=Path,
        help="let every client load adapters of this folder, and unload any, with /v1/load_lora_adapter and "
        "/v1/unload_lora_adapter (default: clients may load and unload none)",
    )
    group.add_argument(
        "--max-loras",
        metavar="COUNT",
        type=integer,
        help=f"largest number of adapters that are loaded at a time (default: {default.max_loras})",
    )
    group.add_argument(
        "--max-lora-rank",
        metavar="RANK",
        type=integer,
        help=f"largest rank of an adapter (default: {default.max_lora_rank})",
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
        help="format of the weights: auto (as stored, of types that there are kernels for), none (floats), or for the"
        " cpu kernels q8, q4 (default: auto)",
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
        type=integer,
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
        "--tensor-parallel",
        metavar="N",
        type=integer,
        help="split the model among N processes that compute each step together: on CUDA the GPU of --device and those "
        f"after it, on the CPU with torch; see docs/workers.md (default: {default.tensor_parallel})",
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
        type=integer,
        help="context length (history, prompt and answer) (default: the model's context length)",
    )


def _add_answers(group: argparse._ArgumentGroup, default: ServeConfig) -> None:
    """How answers are made where a request does not say."""
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


def _add_scheduler(group: argparse._ArgumentGroup, default: ServeConfig) -> None:
    """Batches, the queue and the KV cache."""
    sequences = f"largest number of sequences in a step (default: {default.max_batch})"
    group.add_argument("--max-batch", metavar="SEQUENCES", type=integer, help=sequences)
    group.add_argument(
        "--max-batch-tokens",
        metavar="TOKENS",
        type=integer,
        help="largest number of tokens in a step (default: by device)",
    )
    group.add_argument(
        "--max-queue",
        metavar="REQUESTS",
        type=integer,
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
        type=integer,
        help="where a text repeats itself, guess up to this many next tokens and check them in one step; "
        "answers stay the same; 0: off; see docs/speculation.md "
        "(default: 8 on the CPU kernels, and 0 on torch and for hybrid models)",
    )
    group.add_argument(
        "--mtp",
        action="store_const",
        const=True,
        help="load the head of the model that guesses a token ahead (multi-token prediction), and check its guesses in "
        "the next step; answers stay the same; see docs/speculation.md (default: off)",
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


def _add_sessions(group: argparse._ArgumentGroup, default: ServeConfig) -> None:
    """Sessions and where they are kept."""
    group.add_argument(
        "--session-dir",
        metavar="DIR",
        type=Path,
        help="keep sessions in a log in this folder; they then survive a restart (default: in memory only)",
    )
    group.add_argument(
        "--session-store",
        metavar="URL",
        help="keep sessions in a PostgreSQL database (postgresql://user@host/name) that several servers of the same "
        "model share: each of them can continue every session; needs lmserve[postgres] (default: none)",
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
        type=integer,
        help="largest number of sessions; if there are more, the least recently used idle one is dropped "
        f"(default: {default.max_sessions})",
    )


def _argument(convert: Callable[[str], T], what: str) -> Callable[[str], T]:
    """`convert`, with an error that says what was expected and given."""

    def parse(text: str) -> T:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{what} expected, but {text!r} was given") from error

    return parse


integer = _argument(int, "a whole number")
_number = _argument(float, "a number")
_named_path = _argument(parse_named_path, "a name and a folder such as sql=/adapters/sql")
_disk_tier = _argument(parse_disk_tier, "a folder and a size such as /var/kv,100GiB")
_size = _argument(parse_size, "a size such as 2GiB, 512MiB or a number of bytes")
