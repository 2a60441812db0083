"""Steps of a model with random weights on one GPU: packed weights, the same in bf16, and transformers and vLLM beside.

    .venv/bin/python benchmarks/gpu.py [--device cpu] [--minutes 8] [--shape llama-1b]

Needs no network and no model: it writes a GGUF file into a temporary folder. `--device cpu` is a dry run of a tiny
model, whose numbers say nothing; Triton interprets there (TRITON_INTERPRET=1). What does not fit into the minutes is
left out of the table and named. vLLM and transformers are measured where they are installed; vLLM's times are those of
its engine.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import random_model

CONTEXT: Final = 200  # tokens of each sequence of a decode step
KV_MEMORY: Final = {"cuda": 8 << 30, "cpu": 64 << 20}
TINY: Final = replace(random_model.SHAPES["llama-1b"], layers=2, width=256, inner=512, heads=4, kv_heads=2)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured."""

    shape: random_model.Shape
    vocabulary: int
    batches: tuple[int, ...]
    prompt: int
    rounds: int  # of which the fastest counts


FULL: Final = Sizes(random_model.SHAPES["llama-1b"], 128_256, (1, 8, 32, 128), 4000, 20)
DRY: Final = Sizes(TINY, 320, (1, 2), 70, 1)


@dataclass(slots=True)
class Table:
    """Columns are what was measured, rows the points; nothing is begun after the deadline."""

    sizes: Sizes
    deadline: float
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def points(self) -> list[str]:
        """The names of the rows."""
        return ["loaded in s", "weights in MB", self.prompt, *(f"decode, {n} clients" for n in self.sizes.batches)]

    @property
    def prompt(self) -> str:
        """The name of the row of prompts."""
        return f"prompt of {self.sizes.prompt}"

    def add(self, column: str, point: str, value: float) -> None:
        """Note a number, and say it at once: the run may be cut off."""
        self.columns.setdefault(column, {})[point] = f"{value:,.{2 if value < 10 else 0}f}"
        print(f"{column}: {point}: {self.columns[column][point]}", file=sys.stderr, flush=True)

    def measure(self, column: str, point: str, tokens: int, run: Callable[[], Any]) -> None:
        """Tokens per second of the fastest of several runs, after one that is not measured."""
        if time.monotonic() > self.deadline:
            self.left_out.append(f"{column}: {point}")
            return
        run()
        times = []
        for _ in range(self.sizes.rounds):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        self.add(column, point, tokens / min(times))

    def lines(self) -> Iterator[str]:
        """The table in Markdown; tokens per second where nothing else is said."""
        yield f"| | {' | '.join(self.columns)} |"
        yield "|---" * (len(self.columns) + 1) + "|"
        for point in self.points:
            yield f"| {point} | {' | '.join(column.get(point, '') for column in self.columns.values())} |"
        yield from (f"No time was left for {name}." for name in self.left_out)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--shape", default="llama-1b", choices=random_model.SHAPES)
    given = parser.parse_args()
    dry = given.device == "cpu"
    if dry:
        # Before triton is imported, which reads it once.
        os.environ["TRITON_INTERPRET"] = "1"
    sizes = DRY if dry else replace(FULL, shape=random_model.SHAPES[given.shape])
    table = Table(sizes, time.monotonic() + 60 * given.minutes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.gguf"
        random_model.write(sizes.shape, file, "random", partial(random_model.number_tokens, count=sizes.vocabulary))
        print(f"{describe(given.device)}, {file.stat().st_size / 1e6:,.0f} MB of weights in the file\n", flush=True)
        measures: dict[str, Callable[[str], None]] = {
            "packed": lambda column: measure_lmserve(table, column, file, given.device, quantize="auto"),
            "floats": lambda column: measure_lmserve(table, column, file, given.device, quantize="none"),
        }
        if sizes.shape.architecture == "llama":
            if find_spec("transformers") is not None:
                measures["transformers"] = lambda column: measure_transformers(table, column, given.device)
            if find_spec("vllm") is not None:
                measures["vLLM"] = lambda column: measure_vllm(table, column, Path(folder))
        failed = []
        for column, measure in measures.items():
            try:
                measure(column)
            # One that fails must not take the others' time on a borrowed GPU.
            except Exception as error:  # noqa: BLE001
                failed.append(f"{column} failed: {type(error).__name__}: {error}")
            free_memory(given.device)
    print("\n".join([*table.lines(), *failed]))
    if failed:
        raise SystemExit(1)


def free_memory(device: str) -> None:
    """Give the device back what a column took: the next one plans with what is free."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def describe(device: str) -> str:
    """The device, and the versions that matter."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "a dry run on the CPU, whose numbers say nothing"
    return f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}"


def measure_lmserve(table: Table, column: str, file: Path, device: str, *, quantize: str) -> None:
    """The steps of lmserve's runner."""
    from lmserve.model import RunnerOptions, open_checkpoint
    from stepping import Stepper

    sizes = table.sizes
    options = RunnerOptions(
        device=device,
        ops="torch",
        quantize=quantize,
        max_batch=max(sizes.batches),
        max_model_len=max(sizes.prompt, CONTEXT) + 8,
        max_batch_tokens=max(sizes.prompt, CONTEXT) + max(sizes.batches),
        kv_memory=KV_MEMORY[device],
    )
    begin = time.perf_counter()
    stepper = Stepper(open_checkpoint(file), options)
    table.add(column, "loaded in s", time.perf_counter() - begin)
    table.add(column, "weights in MB", stepper.runner.info.weight_bytes / 1e6)
    prompt = stepper.fill([some_tokens(sizes, sizes.prompt)], [0], sizes.prompt)
    table.measure(column, table.prompt, sizes.prompt, lambda: stepper.run(prompt))
    for batch in sizes.batches:
        for sequence in range(batch):
            stepper.run(stepper.fill([some_tokens(sizes, CONTEXT - 1)], [0], CONTEXT, first=sequence))
        step = stepper.fill([some_tokens(sizes, 1) for _ in range(batch)], [CONTEXT - 1] * batch, CONTEXT)
        table.measure(column, f"decode, {batch} clients", batch, partial(stepper.run, step))


def measure_transformers(table: Table, column: str, device: str) -> None:
    """The forward pass of transformers with random weights of the same shape, eager, in bf16 (fp32 on the CPU)."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

    sizes = table.sizes
    begin = time.perf_counter()
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(LlamaConfig(**hf_config(sizes)), dtype=dtype).eval()
    table.add(column, "loaded in s", time.perf_counter() - begin)
    table.add(column, "weights in MB", sum(weight.nbytes for weight in model.parameters()) / 1e6)

    @torch.inference_mode()
    def run(ids: Any, cache: Any) -> None:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        # Waits for the device, as a step's tokens do.
        logits.argmax(-1).cpu()

    def rows(count: int, length: int) -> Any:
        return torch.from_numpy(np.stack([some_tokens(sizes, length) for _ in range(count)])).long().to(device)

    prompt = rows(1, sizes.prompt)
    table.measure(column, table.prompt, sizes.prompt, lambda: run(prompt, DynamicCache()))
    for batch in sizes.batches:
        cache = DynamicCache()
        run(rows(batch, CONTEXT - 1), cache)
        table.measure(column, f"decode, {batch} clients", batch, partial(run, rows(batch, 1), cache))


def measure_vllm(table: Table, column: str, folder: Path) -> None:
    """vLLM's engine with random weights of the same shape: what a prompt and further tokens of each client take."""
    import json

    from vllm import LLM, SamplingParams

    sizes = table.sizes
    config = hf_config(sizes) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    own = folder / "vllm"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(config))
    begin = time.perf_counter()
    llm = LLM(
        model=str(own),
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,
        max_model_len=max(sizes.prompt, CONTEXT) + 64,
        max_num_seqs=max(sizes.batches),
    )
    table.add(column, "loaded in s", time.perf_counter() - begin)

    def generate(count: int, length: int, new: int) -> None:
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": some_tokens(sizes, length).tolist()} for _ in range(count)]
        llm.generate(prompts, settings, use_tqdm=False)

    with fewer_rounds(table):
        table.measure(column, table.prompt, sizes.prompt, lambda: generate(1, sizes.prompt, 1))
        # Short prompts: nearly all of the time is decoding.
        for batch in sizes.batches:
            table.measure(column, f"decode, {batch} clients", 50 * batch, partial(generate, batch, 1, 50))


@contextmanager
def fewer_rounds(table: Table) -> Iterator[None]:
    """Of runs of many steps."""
    whole = table.sizes
    table.sizes = replace(whole, rounds=min(3, whole.rounds))
    yield
    table.sizes = whole


def hf_config(sizes: Sizes) -> dict[str, Any]:
    """config.json of the shape."""
    shape = sizes.shape
    return {
        "vocab_size": sizes.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }


def some_tokens(sizes: Sizes, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """Token ids that look like none in particular."""
    return np.random.default_rng(count).integers(1, sizes.vocabulary, count, dtype=np.int32)


if __name__ == "__main__":
    main()
