"""What a step of the model alone costs: decode steps at several batch sizes, and prompts, without engine or HTTP.

    .venv/bin/python benchmarks/step.py [MODEL] [--ops cpu|torch] [--kv-dtype ...] [--quantize ...] [--threads N]

MODEL is a GGUF file or a model folder (default: the bundled one).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lmserve.assets import SMOLLM2, fetch
from lmserve.model import RunnerOptions, open_checkpoint
from stepping import I32, Stepper

BATCHES = (1, 8, 32, 64)
CONTEXT = 200  # tokens of each sequence of a decode step
PROMPTS = (512, 4000)
SECONDS = 1.5  # of each measurement


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--prompts", type=int, nargs="*", default=PROMPTS)
    parser.add_argument("--step-tokens", type=int, default=512, help="of a step of a prompt (default: 512)")
    arguments = parser.parse_args()
    options = RunnerOptions(
        device="cpu",
        ops=arguments.ops,
        quantize=arguments.quantize,
        kv_dtype=arguments.kv_dtype,
        threads=arguments.threads,
        max_batch=max(BATCHES),
        max_batch_tokens=arguments.step_tokens,
    )
    begin = time.perf_counter()
    stepper = Stepper(open_checkpoint(arguments.model or fetch(SMOLLM2)), options)
    info = stepper.runner.info
    print(f"{info.name}: {info.weight_bytes / 1e6:.0f} MB of weights, {info.kv_bytes_per_token} B of KV per token")
    print(f"loaded in {time.perf_counter() - begin:.2f} s\n")
    print("| | ms | tokens/s |\n|---|---|---|")
    for batch in arguments.batches:
        seconds = fastest_decode(stepper, batch)
        print(f"| decode, batch {batch} | {seconds * 1e3:.2f} | {batch / seconds:.0f} |", flush=True)
    for length in arguments.prompts:
        seconds = fastest_prompt(stepper, length)
        print(f"| prompt of {length} | {seconds * 1e3:.0f} | {length / seconds:.0f} |", flush=True)


def tokens(count: int, seed: int) -> I32:
    """Token ids that look like none in particular."""
    return np.random.default_rng(seed).integers(0, 10_000, count, dtype=np.int32)


def fastest_decode(stepper: Stepper, batch: int) -> float:
    """Seconds of the fastest step in which `batch` sequences have a token each."""
    for sequence in range(batch):
        stepper.run(stepper.fill([tokens(CONTEXT - 1, sequence)], [0], CONTEXT, first=sequence))
    sizes = stepper.fill([tokens(1, s) for s in range(batch)], [CONTEXT - 1] * batch, CONTEXT)
    return fastest(lambda: stepper.run(sizes))


def fastest_prompt(stepper: Stepper, length: int) -> float:
    """Seconds of the fastest pass through a prompt, in steps as large as the runner allows."""
    prompt = tokens(length, 0)

    def whole() -> None:
        for first in range(0, length, stepper.max_tokens):
            stepper.run(stepper.fill([prompt[first : first + stepper.max_tokens]], [first], length))

    return fastest(whole)


def fastest(call: Callable[[], None]) -> float:
    """Seconds of the fastest of the calls that fit in SECONDS; two at least."""
    best, end, calls = float("inf"), time.perf_counter() + SECONDS, 0
    while calls < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        best, calls = min(best, time.perf_counter() - begin), calls + 1
    return best


if __name__ == "__main__":
    main()
