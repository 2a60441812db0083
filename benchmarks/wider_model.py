"""SmolLM2 with rows of whole blocks of 256 weights, for benchmarks/accuracy.py --types: the same function, padded.

    .venv/bin/python benchmarks/wider_model.py OUT.gguf [MODEL.gguf]
    llama-quantize --pure OUT.gguf Q2_K.gguf Q2_K

The rows of SmolLM2-135M have 576 weights, so that llama-quantize falls back to types with blocks of 32. Here they get
768: each group of three heads gets a fourth, whose output is not used, and states get elements that are always 0.
Weights of norms are scaled by what the larger number of elements changes in the mean of squares.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import gguf
import numpy as np
from lmserve.assets import SMOLLM2, fetch

F32 = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def main() -> None:
    """Write the wider model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model", nargs="?", type=Path)
    arguments = parser.parse_args()
    reader = gguf.GGUFReader(arguments.model or fetch(SMOLLM2))

    def value(key: str) -> int:
        return int(reader.fields[f"llama.{key}"].contents())

    heads, groups, hidden = value("attention.head_count"), value("attention.head_count_kv"), value("embedding_length")
    head_dim = hidden // heads
    wide_heads = next(n for n in range(heads, 16 * heads) if n % groups == 0 and n * head_dim % 256 == 0)
    wide = wide_heads * head_dim
    eps = float(reader.fields["llama.attention.layer_norm_rms_epsilon"].contents())
    writer = gguf.GGUFWriter(arguments.out, "llama")
    replaced = {
        "llama.attention.head_count": wide_heads,
        "llama.embedding_length": wide,
        "llama.attention.layer_norm_rms_epsilon": eps * hidden / wide,
    }
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, replaced.get(key, field.contents()), kind, inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if name.endswith("norm"):
            values = padded(values, wide, 0) * np.float32(math.sqrt(hidden / wide))
        elif name == "attn_q":
            values = padded(padded_heads(values, groups, head_dim, wide_heads, 0), wide, 1)
        elif name == "attn_output":
            values = padded(padded_heads(values, groups, head_dim, wide_heads, 1), wide, 0)
        elif name == "ffn_down":
            values = padded(values, wide, 0)
        else:
            values = padded(values, wide, 1)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def padded(values: F32, size: int, axis: int) -> F32:
    """With zeros at the end of an axis."""
    widths = [(0, size - values.shape[axis] if at == axis else 0) for at in range(values.ndim)]
    return np.pad(values, widths)


def padded_heads(values: F32, groups: int, head_dim: int, heads: int, axis: int) -> F32:
    """With heads of zeros at the end of each group of those along an axis."""
    rows = np.moveaxis(values, axis, 0)
    each = padded(rows.reshape(groups, -1, head_dim, rows.shape[1]), heads // groups, 1)
    return np.moveaxis(each.reshape(heads * head_dim, -1), 0, axis)


if __name__ == "__main__":
    main()
