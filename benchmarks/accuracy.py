"""How near the cpu operations come to fp32 with the same stored weights: the table of docs/cpu.md.

    .venv/bin/python benchmarks/accuracy.py [MODEL] [--tokens 2000] [--text FILE]
    .venv/bin/python benchmarks/accuracy.py --types FILE.gguf FILE.gguf ...

Passages of a text (by default Python's own language reference, which every Python has) are read by torch in fp32 and
by the cpu operations in each format. For every token: the KL divergence of the predicted distribution from torch's, and
whether the most likely token is the same. Takes a minute. With --types, each file is computed as it is stored.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from lmserve._core import ENTRY_TOKENS
from lmserve.assets import SMOLLM2, fetch
from lmserve.model import Checkpoint, RunnerOptions, open_checkpoint
from stepping import F32, I32, Stepper

PASSAGE = 500  # tokens
FORMATS = {
    "as stored, KV fp16 (default)": {},
    "as stored, KV int8": {"kv_dtype": "int8"},
    "as stored, KV fp32": {"kv_dtype": "fp32"},
    "`--quantize q8`": {"quantize": "q8"},
    "`--quantize q4`": {"quantize": "q4"},
    "`--quantize none`": {"quantize": "none"},
    "`--quantize none`, KV fp16": {"quantize": "none", "kv_dtype": "fp16"},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--types", type=Path, nargs="+", default=[])
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model or fetch(SMOLLM2))
    text = arguments.text.read_text("utf-8") if arguments.text else "\n".join(topics[name] for name in sorted(topics))
    ids = np.array(checkpoint.tokenizer().encode(text[: 20 * arguments.tokens]), np.int32)[: arguments.tokens]
    passages = [ids[first : first + PASSAGE] for first in range(0, len(ids), PASSAGE)]
    print(f"{checkpoint.name}, {len(ids)} tokens in passages of {PASSAGE}\n")
    print("| weights and cache | mean KL | largest KL | same top token | weights, MB |\n|---|---|---|---|---|")
    if arguments.types:
        for path in arguments.types:
            stored = open_checkpoint(path)
            compare(path.stem, logits(stored, passages, ops="torch"), logits(stored, passages, ops="cpu"))
        return
    reference = logits(checkpoint, passages, ops="torch")
    for name, changes in FORMATS.items():
        compare(name, reference, logits(checkpoint, passages, ops="cpu", **changes))


def compare(name: str, reference: Predictions, found: Predictions) -> None:
    """Print a row of the table."""
    divergence = kl(reference.values, found.values)
    agreement = np.mean(reference.values.argmax(-1) == found.values.argmax(-1))
    print(
        f"| {name} | {divergence.mean():.6f} | {divergence.max():.4f} | {agreement:.2%} |"
        f" {found.weight_bytes / 1e6:.0f} |",
        flush=True,
    )


class Predictions:
    """The logits [tokens, vocab] of every token of the passages, and the bytes of the weights that they come from."""

    def __init__(self, values: F32, weight_bytes: int) -> None:
        self.values = values
        self.weight_bytes = weight_bytes


def logits(checkpoint: Checkpoint, passages: list[I32], **options: str) -> Predictions:
    """What a checkpoint that is run with these options predicts."""
    given = RunnerOptions(
        device="cpu", max_batch=PASSAGE, max_batch_tokens=PASSAGE + ENTRY_TOKENS, max_model_len=PASSAGE, **options
    )
    stepper = Stepper(checkpoint, given)
    rows = [
        stepper.logits(stepper.fill([passage], [0], PASSAGE, rows=np.arange(len(passage), dtype=np.int32))).copy()
        for passage in passages
    ]
    return Predictions(np.concatenate(rows), stepper.runner.info.weight_bytes)


def kl(reference: F32, found: F32) -> F32:
    """KL divergence [tokens] of the found distributions from the reference's."""
    divergence = np.empty(len(reference), np.float32)
    for row, (p, q) in enumerate(zip(reference, found, strict=True)):
        log_p, log_q = log_softmax(p), log_softmax(q)
        divergence[row] = np.sum(np.exp(log_p) * (log_p - log_q))
    return divergence


def log_softmax(row: F32) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Log-probabilities of a row of logits, in float64."""
    wide = row.astype(np.float64) - row.max()
    return np.asarray(wide - np.log(np.exp(wide).sum()))


if __name__ == "__main__":
    main()
