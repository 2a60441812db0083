"""Makes a trace for `lmserve simulate --trace` and `lmserve bench --trace`: requests of `mixed` that arrive at random.

.venv/bin/python benchmarks/trace.py --rate 2 --requests 200 > trace.jsonl
"""

from __future__ import annotations

import argparse
import json
import random

from lmserve.bench.workload import mixed_length


def main() -> None:
    """Print the trace: a Poisson process of prompts as long as those of `mixed`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--output-tokens", type=int, default=128, help="on average; 16 at least")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = random.Random(arguments.seed)  # noqa: S311 - not a secret
    arrival = 0.0
    for _ in range(arguments.requests):
        arrival += source.expovariate(arguments.rate)
        output = 16 + int(source.expovariate(1 / max(arguments.output_tokens - 16, 1)))
        line = {"arrival": round(arrival, 4), "prompt_tokens": mixed_length(source), "output_tokens": min(output, 1024)}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
