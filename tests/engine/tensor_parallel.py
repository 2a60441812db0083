"""Runs tiny models on several ranks, all by one group of processes, beside each model alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_adapters
import tiny_models
from parallel_rank import ADAPTER

RANK = Path(__file__).with_name("parallel_rank.py")
TIMEOUT = 600


@dataclass(frozen=True)
class Found:
    """What rank 0 says of a model: its greedy tokens (or vectors) on all ranks and alone, and bytes of its weights."""

    found: Any = None
    alone: Any = None
    bytes: int = 0
    alone_bytes: int = 0
    error: str | None = None


def run(folder: Path, ranks: int) -> dict[str, Found]:
    """What comes of each model in `folder`, by the name of its folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), str(ranks), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if rank == 0 else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    try:
        said, _ = processes[0].communicate(timeout=TIMEOUT)
        lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"model"')]
        assert [process.wait(TIMEOUT) for process in processes] == [0] * ranks, said[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {line.pop("model"): Found(**line) for line in lines}


def make(folder: Path, families: Iterable[str], ranks: int) -> None:
    """Save the tiny models of these families, of sizes that so many ranks divide."""
    for family in families:
        changes: dict[str, Any] = {}
        if ranks > 2:
            # Half of a head of StableLM is rotated, which must be even.
            changes = {"num_attention_heads": 4 if family == "stablelm" else 8, "moe_intermediate_size": 48}
            if hasattr(tiny_models.CONFIGS[family](), "kv_lora_rank"):
                changes["num_key_value_heads"] = 8
        path = folder / family
        path.mkdir()
        model = tiny_models.make(family, path, **changes)
        if modules := tiny_adapters.changeable(model, path):
            # Large enough to change greedy tokens.
            tiny_adapters.write(path / ADAPTER, model, modules, alpha=20)
