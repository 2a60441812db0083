"""Write a GGUF file of Llama 3.2 1B's shape with random weights and the default model's tokenizer: something larger
to measure.

    .venv/bin/python benchmarks/random_model.py FILE.gguf

Weights are half precision; llama.cpp's `llama-quantize FILE.gguf OUT.gguf Q4_K_M` makes what people run of it. Greedy
requests with `ignore_eos` cost a server what those to a trained model do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from lmserve.assets import SMOLLM2, fetch

WIDTH: Final = 2048
FEED_FORWARD: Final = 8192
LAYERS: Final = 16
HEADS: Final = 32
KV_HEADS: Final = 8


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_name("random")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary = copy_tokenizer(writer)
    writer.add_vocab_size(vocabulary)
    add_weights(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def copy_tokenizer(writer: gguf.GGUFWriter) -> int:
    """Copy the default model's tokenizer and chat template; how many tokens it has."""
    reader = gguf.GGUFReader(fetch(SMOLLM2))
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            kinds = field.types
            sub_type = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=sub_type)
    return len(reader.fields["tokenizer.ggml.tokens"].contents())


def add_weights(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """Add normally distributed matrices, whose outputs are as large as their inputs, and norms of ones."""
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), np.float32) / np.sqrt(np.float32(columns))
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    matrix("token_embd", vocabulary, WIDTH)
    norm("output_norm")
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.attn_q", WIDTH, WIDTH)
        matrix(f"{block}.attn_k", WIDTH * KV_HEADS // HEADS, WIDTH)
        matrix(f"{block}.attn_v", WIDTH * KV_HEADS // HEADS, WIDTH)
        matrix(f"{block}.attn_output", WIDTH, WIDTH)
        matrix(f"{block}.ffn_gate", FEED_FORWARD, WIDTH)
        matrix(f"{block}.ffn_up", FEED_FORWARD, WIDTH)
        matrix(f"{block}.ffn_down", WIDTH, FEED_FORWARD)


if __name__ == "__main__":
    main()
