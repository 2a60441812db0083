"""Writes the page on models, which tests/unit/test_models_page.py compares: python tools/models.py FILE."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

from lmserve.model.families import FAMILIES
from lmserve.model.families.family import Family
from lmserve.model.quantization import Method
from lmserve.model.tensors import PLAIN_TYPES, QUANTIZED_TYPES

HEAD = """# Models

Written by `make models` from the registry of families, `lmserve.model.families`.

The tests hold each family that generates to transformers: a tiny random model in fp32 has logits that differ by less
than 0.001, and the same greedy tokens over 64 steps. That holds alone, in a batch of 16, in pieces of 7 tokens, with a
shared prefix, preempted, continued, forked and rewound; on torch and on the CPU kernels. From GGUF it holds in a batch.

On the CPU kernels a request's logits are the same to the bit alone, in any batch and in any pieces.
Layers with a window compute what the reference does; their KV cache is as long as that of the others.

| Family | config.json | GGUF | Not supported |
|---|---|---|---|
"""
TAIL = """
## Files

| File | Types of weights |
|---|---|
| safetensors, one or several files | {plain}; {methods} |
| GGUF, one or several files | {plain}, {quantized} |

A model that is not supported is refused before its weights are read; the message says which part of it is not computed.
"""


def page() -> str:
    """The page's text."""
    tail = TAIL.format(
        plain=", ".join(PLAIN_TYPES), methods=", ".join(get_args(Method)), quantized=", ".join(QUANTIZED_TYPES)
    )
    return HEAD + "".join(row(family) for family in FAMILIES) + tail


def row(family: Family) -> str:
    """A family's line."""
    summary = (sys.modules[family.hf_config.__module__].__doc__ or "").split("\n\n", 1)[0]
    architectures = ", ".join(f"`{name}`" for name in family.hf_architectures)
    gguf = f"`{family.gguf_architecture}`" if family.gguf_architecture else ""
    return f"| **{family.name}** {' '.join(summary.split())} | {architectures} | {gguf} | {family.limits} |\n"


def main() -> None:
    Path(sys.argv[1]).write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
