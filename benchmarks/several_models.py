"""Two chat models and one that embeds in one server, under load, unloaded when idle: its memory and what was planned.

    .venv/bin/python benchmarks/several_models.py [--seconds 60] [--clients 6] [--model NAME=MODEL ...]

All models are asked at first, then the first alone, then none. A row for each of these: the models that were loaded,
what `lmserve plan` says of them (weights and KV cache), and the most that the process had in memory then, beyond what
it had before a model was loaded. Exits with 1 if a request failed, if the process held more than was planned and
`SLACK`, or if a model was not unloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import httpx
from lmserve.assets import MINILM, SMOLLM2
from lmserve.config import ServeConfig, parse_size
from lmserve.engine.load import ModelPlan
from lmserve.source import find_model

MODELS: Final = (f"chat={SMOLLM2.name}", f"draft={SMOLLM2.name}", f"embed={MINILM.name}")
KV_MEMORY: Final = "256MiB"
IDLE: Final = 4  # seconds
WAITING: Final = 120.0  # seconds for a start, and for a model to be unloaded
# Activations, threads, and what the allocator keeps: a tenth of a gigabyte, whatever the models are.
SLACK: Final = 100 << 20
WORDS: Final = (
    "river",
    "stone",
    "seven",
    "green",
    "under",
    "music",
    "paper",
    "north",
    "window",
    "bread",
    "early",
    "salt",
)
COLUMNS: Final = "{:<14} {:<20} {:>12} {:>13} {:>9} {:>6}"


def planned(model: str) -> tuple[int, bool]:
    """Bytes that the plan names, weights and KV cache; and whether the model chats."""
    source = find_model(model)
    plan = ModelPlan(source.path, ServeConfig(kv_memory=parse_size(KV_MEMORY)), source.published)
    return plan.memory.weight_bytes + plan.memory.kv_bytes, plan.checkpoint.kind == "generate"


def resident(process: subprocess.Popen[bytes]) -> int:
    """Bytes of the process in memory, pages of files among them."""
    (kilobytes,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return int(kilobytes) * 1024


def loaded(output: str, names: Sequence[str]) -> list[str]:
    """The models that are loaded now, by what the server has printed."""
    return [
        name
        for name in names
        if output.count(f"the model {name} was loaded") > output.count(f"the model {name} was unloaded")
    ]


async def client(
    http: httpx.AsyncClient, chats: dict[str, bool], seed: int, until: float, counts: Counter[str]
) -> None:
    """Asks one of the models after the other, until the time is over."""
    rng = random.Random(seed)  # noqa: S311 - it chooses words
    while time.monotonic() < until:
        model = rng.choice(list(chats))
        text = " ".join(rng.choices(WORDS, k=rng.randint(4, 600 if chats[model] else 150)))
        body: dict[str, object] = {"model": model, "input": text}
        if chats[model]:
            messages = [{"role": "user", "content": text}]
            body = {"model": model, "messages": messages, "max_tokens": rng.randint(1, 64)}
        path = "/v1/chat/completions" if chats[model] else "/v1/embeddings"
        reply = await http.post(path, json=body)
        counts["requests"] += 1
        if reply.status_code != 200:
            counts["wrong"] += 1
            print(f"{model}: {reply.status_code} {reply.text[:200]}", file=sys.stderr)


async def ask(
    process: subprocess.Popen[bytes], url: str, chats: dict[str, bool], seconds: float, clients: int
) -> tuple[Counter[str], int]:
    """Requests for `seconds`; what became of them, and the most bytes that the process had meanwhile."""
    counts: Counter[str] = Counter()
    most = 0
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        until = time.monotonic() + seconds
        asking = asyncio.gather(*(client(http, chats, seed, until, counts) for seed in range(clients)))
        while not asking.done():
            most = max(most, resident(process))
            await asyncio.sleep(0.2)
        await asking
    return counts, most


def wait(log: Path, condition: str, names: Sequence[str] = (), remaining: int = 0) -> str:
    """What the server has printed, once it has printed `condition` and no more than `remaining` models are loaded."""
    deadline = time.monotonic() + WAITING
    while condition not in (text := log.read_text("utf-8")) or len(loaded(text, names)) > remaining:
        if time.monotonic() > deadline:
            sys.exit(f"the server did not come so far in {WAITING:.0f} s:\n{text}")
        time.sleep(0.05)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of load, twice (default: 60)")
    parser.add_argument("--clients", type=int, default=6, help="that ask at a time (default: 6)")
    parser.add_argument("--model", action="append", dest="models", metavar="NAME=MODEL", help=f"{', '.join(MODELS)}")
    options = parser.parse_args()
    models = dict(pair.split("=", 1) for pair in options.models or MODELS)
    plans = {name: planned(model) for name, model in models.items()}
    chats = {name: chat for name, (_, chat) in plans.items()}
    command = [sys.executable, "-m", "lmserve", "serve", "--port", "0", "--idle-unload", str(IDLE)]
    command += ["--kv-memory", KV_MEMORY, "--request-log", "off"]
    for name, model in models.items():
        command += ["--model", f"{name}={model}"]
    right = False
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "output")
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            printed = wait(log, "Ready.")
            (url,) = re.findall(r"^API +(http://\S+)$", printed, re.MULTILINE)
            before = resident(process)
            print(COLUMNS.format("moment", "loaded", "planned, MB", "resident, MB", "requests", "wrong"))

            def show(moment: str, here: Sequence[str], counts: Counter[str], most: int) -> bool:
                """Print a row. Returns whether it is as it should be."""
                plan, taken = sum(plans[name][0] for name in here), most - before
                figures = (plan // 1_000_000, taken // 1_000_000, counts["requests"], counts["wrong"])
                print(COLUMNS.format(moment, ", ".join(here) or "none", *figures), flush=True)
                return counts["wrong"] == 0 and taken <= plan + SLACK

            asked = asyncio.run(ask(process, url, chats, options.seconds, options.clients))
            right = show("all asked", list(models), *asked)
            first = next(iter(models))
            alone = {first: chats[first]}
            asyncio.run(ask(process, url, alone, 2 * IDLE, options.clients))
            # The others have had no request for longer than they may be idle.
            wait(log, f"the model {first} was loaded", list(models), remaining=1)
            asked = asyncio.run(ask(process, url, alone, options.seconds, options.clients))
            right &= show(f"{first} asked", [first], *asked)
            wait(log, "Ready.", list(models))
            right &= show("none asked", [], Counter(), resident(process))
        finally:
            process.terminate()
            process.wait()
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
