"""What sessions of a hybrid model take in memory, beside what `lmserve plan` says of them.

    .venv/bin/python benchmarks/state_memory.py [--sessions 100] [--tokens 4000] [--shape qwen3.5-2b] [--model FILE]

Without --model: random weights of `--shape` (see `random_model.py`). Each session has one turn of that many tokens, one
after the other; all stay in the model's memory, by a snapshot of the state and the blocks before it. "Planned" is what
the plan has for as many slots and blocks as are in use then, and of the whole process for weights, KV cache and states.
"Measured" is the anonymous memory of the server's process: how much it grew by the sessions, and all of it.

The default takes 400,000 tokens of prefill, which may be an hour. Exits with 1 if a session was evicted, or if a figure
is off by more than 5 %. With few sessions the whole process is, for the interpreter itself takes about 50 MB.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import httpx
from lmserve.config import ServeConfig
from lmserve.engine.load import ModelPlan
from lmserve.model.options import MemoryPlan
from resume import ANSWER, metric, serving, turn

MEBI: Final = 1 << 20
# For the turn that runs, and what templates begin with.
SPARE_SLOTS: Final = 2
SPARE_TOKENS: Final = 128
OFF: Final = 0.05
COLUMNS: Final = "{:<32} {:>14} {:>14} {:>9}"


def anonymous(process: int) -> int:
    """Bytes of a process in memory that are no pages of files."""
    status = Path(f"/proc/{process}/status").read_text()
    (kilobytes,) = re.findall(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024


def gauge(url: str, name: str, state: str) -> int:
    """A gauge's value for a state."""
    text = httpx.get(f"{url}/metrics").text
    (value,) = re.findall(rf'^{name}{{(?:.*,)?state="{state}"(?:,.*)?}} (\d+)$', text, re.MULTILINE)
    return int(value)


def in_use(url: str) -> tuple[int, int]:
    """Slots and blocks that are not free."""
    return (
        sum(gauge(url, "lmserve_state_slots", state) for state in ("owned", "snapshot")),
        sum(gauge(url, "lmserve_kv_blocks", state) for state in ("owned", "cached")),
    )


def settings(model: Path, sessions: int, tokens: int) -> ServeConfig:
    """Those of a server that has room for these sessions, and little more."""
    length = tokens + SPARE_TOKENS
    shared = {"max_model_len": length, "max_batch": 1, "state_every": length, "weights_cache": "off"}
    small = ModelPlan(model, ServeConfig(**shared, kv_memory=64 * MEBI + 2**30, state_slots=1)).memory
    memory = -(-(sessions + 1) * small.kv_bytes_of(length) // MEBI) * MEBI
    return ServeConfig(**shared, kv_memory=memory, state_slots=sessions + SPARE_SLOTS)


def fill(url: str, sessions: int, tokens: int) -> int:
    """Give each session its turn; gives the tokens that all of them have."""
    card = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    words = " ".join(f"word {number}" for number in range(1000, 1000 + tokens))
    sample = words[:4000]
    count = httpx.post(f"{url}/tokenize", json={"model": card, "prompt": sample}).json()["count"]
    size = len(sample) * (tokens - ANSWER) // count
    total = 0
    for session in range(sessions):
        # The number comes first: no session has what another one had.
        usage, _ = turn(url, session, prompt=f"{session} {words}"[:size], sequence_start=True)
        total += usage["prompt_tokens"] + usage["completion_tokens"]
        print(f"\r{session + 1} of {sessions}", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    return total


def show(what: str, planned: int, measured: int) -> bool:
    """Print a row. Returns whether its figures are close."""
    off = measured / planned - 1
    print(COLUMNS.format(what, f"{planned / MEBI:.1f}", f"{measured / MEBI:.1f}", f"{100 * off:+.1f} %"), flush=True)
    return abs(off) <= OFF


def measure(model: Path, plan: MemoryPlan, config: ServeConfig, sessions: int, tokens: int) -> bool:
    """Print the table. Returns whether all is as it should be."""
    arguments = ["--device", "cpu", "--max-batch", "1", "--weights-cache", "off"]
    for name in ("max_model_len", "kv_memory", "state_slots", "state_every"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    with (
        tempfile.TemporaryDirectory(prefix="lmserve-state-memory-") as folder,
        serving(Path(folder), str(model), *arguments) as (process, url),
    ):
        # What steps write to is there from the first long prompt on.
        fill(url, 1, tokens)
        before, slots_before, blocks_before = anonymous(process.pid), *in_use(url)
        total = fill(url, sessions, tokens)
        slots, blocks = in_use(url)
        after = anonymous(process.pid)
        names = ("lmserve_state_snapshot_evictions_total", "lmserve_kv_evictions_total")
        evicted = sum(metric(url, name) for name in names)
    print(f"{sessions} sessions, {total} tokens: {slots} slots and {blocks} blocks in use, {evicted} evicted")
    print(COLUMNS.format("", "planned, MiB", "measured, MiB", "off by"))
    block = plan.block_size * plan.kv_bytes_per_token
    grown = (slots - slots_before) * plan.state_bytes + (blocks - blocks_before) * block
    right = show("the sessions but the first", grown, after - before)
    whole = plan.weight_bytes + plan.kv_bytes + plan.states_bytes
    return show("the process, all that is planned", whole, after) and right and not evicted


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--shape", default="qwen3.5-2b")
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmserve-random-") as folder:
        model = given.model
        if model is None:
            model = Path(folder, f"{given.shape}.gguf")
            writer = Path(__file__).with_name("random_model.py")
            subprocess.run([sys.executable, str(writer), given.shape, str(model)], check=True)
        config = settings(model, given.sessions, given.tokens)
        plan = ModelPlan(model, config).memory
        if not plan.state_slots:
            sys.exit(f"{model} has no recurrent state")
        right = measure(model, plan, config, given.sessions, given.tokens)
    sys.exit(not right)


if __name__ == "__main__":
    main()
