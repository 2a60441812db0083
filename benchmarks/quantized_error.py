"""What quantized GGUF files lose of the weights they were made of, side by side.

    lmserve quantize MODEL-F16.gguf OURS.gguf --type Q4_K_M
    llama-quantize MODEL-F16.gguf THEIRS.gguf Q4_K_M
    .venv/bin/python benchmarks/quantized_error.py MODEL-F16.gguf OURS.gguf THEIRS.gguf

For each type: over the matrices that have it, the mean of the squared error as a part of the squares of the weights, in
each quantized file.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import gguf
import numpy as np


def main() -> None:
    """Print a row for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("quantized", type=Path, nargs="+")
    arguments = parser.parse_args()
    files = [{tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in arguments.quantized]
    errors: dict[str, list[list[float]]] = defaultdict(list)
    for tensor in gguf.GGUFReader(arguments.source).tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        found = [file[tensor.name] for file in files]
        if found[0].tensor_type == tensor.tensor_type or weights.ndim == 1:
            continue
        read = [gguf.dequantize(one.data, one.tensor_type).reshape(weights.shape) for one in found]
        kind = "/".join(dict.fromkeys(one.tensor_type.name for one in found))
        errors[kind].append([float(((values - weights) ** 2).sum() / (weights**2).sum()) for values in read])
    print("type", "matrices", *(path.name for path in arguments.quantized))
    for kind, rows in errors.items():
        print(kind, len(rows), *(f"{error:.6f}" for error in np.mean(rows, axis=0)))


if __name__ == "__main__":
    main()
