"""Flags that other servers have for what `lmserve serve` has, too; or the reason why there is no such flag here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from lmserve.cli.errors import CommandError

# Of llama.cpp, vLLM, SGLang and LMDeploy.
ALIASES: Final = {
    "-m": "--model",
    "--model-path": "--model",
    "-hf": "--model",
    "-hfr": "--model",
    "--hf-repo": "--model",
    "-c": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "--context-length": "--max-model-len",
    "--session-len": "--max-model-len",
    "-a": "--served-model-name",
    "--alias": "--served-model-name",
    "--model-name": "--served-model-name",
    "--lora-modules": "--lora",
    "--lora-paths": "--lora",
    "--max-loras-per-batch": "--max-loras",
    "-t": "--threads",
    "-np": "--max-batch",
    "--parallel": "--max-batch",
    "--max-num-seqs": "--max-batch",
    "--max-batch-size": "--max-batch",
    "--max-running-requests": "--max-batch",
    "--max-num-batched-tokens": "--max-batch-tokens",
    "--gpu-memory-utilization": "--gpu-memory-fraction",
    "--mem-fraction-static": "--gpu-memory-fraction",
    "--kv-cache-dtype": "--kv-dtype",
    "--server-name": "--host",
    "--server-port": "--port",
    "--api-keys": "--api-key",
    "--allow-origins": "--cors-origin",
    "--uvicorn-log-level": "--log-level",
    "--ssl-certfile": "--tls-cert",
    "--ssl-cert-file": "--tls-cert",
    "--ssl-keyfile": "--tls-key",
    "--ssl-key-file": "--tls-key",
    "--otlp-traces-endpoint": "--otlp-endpoint",
    "--tool-call-parser": "--tool-parser",
    "--no-enable-prefix-caching": "--no-prefix-cache",
    "--disable-radix-cache": "--no-prefix-cache",
}
# With the value that goes with them.
WITH_VALUE: Final = {
    "--disable-log-requests": ("--request-log", "off"),
    "--disable-uvicorn-access-log": ("--request-log", "off"),
}
# What is so anyway.
DEFAULT: Final = frozenset(
    {
        *("--enable-prefix-caching", "--enable-auto-tool-choice", "--jinja", "--metrics", "--enable-metrics"),
        *("-cb", "--cont-batching"),
        "--enable-lora",
    }
)
# With the only value that there is; any other one is refused for the reason.
ONE_DEVICE: Final = "lmserve runs a model on one device; choose it with --device"
ONLY: Final = {
    "--tensor-parallel-size": ("1", ONE_DEVICE),
    "-tp": ("1", ONE_DEVICE),
    "--tp": ("1", ONE_DEVICE),
    "--tp-size": ("1", ONE_DEVICE),
    "--pipeline-parallel-size": ("1", ONE_DEVICE),
    "-pp": ("1", ONE_DEVICE),
    "--data-parallel-size": ("1", "a server has one copy of its model; start several servers behind a load balancer"),
    "-dp": ("1", "a server has one copy of its model; start several servers behind a load balancer"),
}
REFUSED: Final = {
    "-ngl": "lmserve puts the whole model on one device: --device cuda or --device cpu",
    "--gpu-layers": "lmserve puts the whole model on one device: --device cuda or --device cpu",
    "--n-gpu-layers": "lmserve puts the whole model on one device: --device cuda or --device cpu",
    "--quantization": "lmserve reads the format from the model's files; for the CPU, --quantize q8 or q4 changes it",
    "--trust-remote-code": "lmserve never runs code from a model's folder; remove the flag",
    "--slot-save-path": "use --session-dir to keep sessions",
    "--chat-template": "lmserve uses the model's own chat template; to change it, put another one into the model's "
    "folder",
}


def translated(arguments: Sequence[str]) -> list[str]:
    """The command line with this server's names. Raises CommandError (exit code 2) for what it does not have."""
    return list(_translated(iter(arguments)))


def _translated(arguments: Iterator[str]) -> Iterator[str]:
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument == "--":
            yield argument
            yield from arguments
        elif flag in ALIASES:
            yield ALIASES[flag] + equals + value
        elif flag in WITH_VALUE:
            yield from WITH_VALUE[flag]
        elif flag in ONLY:
            only, reason = ONLY[flag]
            given = value if equals else next(arguments, "")
            if given != only:
                raise CommandError(f"{flag} must be {only}, but {given!r} was given: {reason}", exit_code=2)
        elif flag in REFUSED:
            raise CommandError(f"there is no {flag}: {REFUSED[flag]}", exit_code=2)
        elif flag not in DEFAULT:
            yield argument
