"""Writes the page on models, which tests/unit/test_models_page.py compares: python tools/models.py FILE."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

from lmserve.model.families import all_families
from lmserve.model.families.family import Family
from lmserve.model.quantization import Method
from lmserve.model.tensors import PLAIN_TYPES, QUANTIZED_TYPES

HEAD = """# Models

`make models` generates this page from the registry of families, `lmserve.model.families`.

The tests compare each family that generates with transformers. For a tiny random model in fp32, the logits differ by
less than 0.001, and 64 greedy tokens are the same: alone, in a batch of 16, with the prompt in chunks of 7 tokens, with
a shared prefix, preempted, continued, forked and rewound; on torch and on the CPU kernels. From GGUF, the tests compare
a batch.

On the CPU kernels, the logits of a request are bit for bit the same in any batch and in any chunks.
Layers with a sliding window keep only the keys and values that the window shows, in whole blocks: a sequence holds one
block more than its window there. See [sliding windows](sessions.md#sliding-windows).

| Family | config.json | GGUF | Not supported |
|---|---|---|---|
"""
TAIL = """
## Files

| File | Types of weights |
|---|---|
| safetensors, one or several files | {plain}; {methods} |
| GGUF, one or several files | {plain}, {quantized} |

## Longrope

Phi-3, Phi-4-mini and Phi-3.5-MoE have two lists of factors that their frequencies are divided by: short ones, for
sequences up to the original context length (4,096 tokens), and long ones. transformers chooses in each forward pass, by
the longest sequence of the batch; where Phi-3's generation passes the original length, all keys are computed again.

lmserve chooses once, by the server's context, as vLLM and llama.cpp do. So the keys of a prefix are the same in every
sequence, whatever its length, and the prefix cache and sessions can share them.

| `--max-model-len` | A sequence up to the original length | A longer sequence |
|---|---|---|
| up to the original length | short factors, as transformers | refused: it is longer than the context |
| longer, or the model's own | long factors; transformers has the short ones | long factors, as transformers |

`lmserve plan` and the start of the server say when long factors are chosen. A server for short texts alone is closer
to the model with `--max-model-len 4096`.

## Other models

`pip install 'lmserve[transformers]'` lets the server run a model folder of another architecture. transformers computes
its layers; lmserve manages the KV cache, batches, sessions and prefixes, and samples. This is slower than a native
family. It works on the CPU and on CUDA with torch's operations, so `--quantize` and `--kv-dtype` do not apply.

- transformers must support the model as a causal language model, and allow its attention to be replaced: GPT-2,
  GPT-NeoX, GPT-J, OPT, Phi 1 and 2, Gemma, Gemma 3n, GLM-4, OLMo, Helium, ERNIE 4.5, and most others since 2023. The
  server never runs a model's own code.
- Latent attention is expanded: the cache has the keys and values of all heads, and takes more memory than in a native
  family.
- At its start, the server computes a prompt in chunks, compares the result with that of transformers alone, and ends if
  they differ.
- The server refuses, with the reason, layers with a recurrent state or linear attention, models that do not take
  positions (ALiBi), encoder-decoders, and rotations that depend on the longest sequence of a batch. Of multimodal
  models, it serves the text model, where transformers has that alone.

The tests compare 15 such architectures with transformers: in a batch, with the prompt in chunks of 7 tokens, with a
shared prefix, preempted, continued and rewound.

The server refuses an unsupported model before it reads the weights. The message names the part that is not supported.
"""


def page() -> str:
    """The page's text."""
    tail = TAIL.format(
        plain=", ".join(PLAIN_TYPES), methods=", ".join(get_args(Method)), quantized=", ".join(QUANTIZED_TYPES)
    )
    return HEAD + "".join(row(family) for family in all_families()) + tail


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
