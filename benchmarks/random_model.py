"""Write a GGUF file of a known model's shape with random weights and the default model's tokenizer, to measure it.

    .venv/bin/python benchmarks/random_model.py SHAPE FILE.gguf

Weights have the types that Q4_K_M files have (gpt-oss: MXFP4), and are drawn as they are stored: nothing is quantized.
Greedy requests with `ignore_eos` cost a server what those to a trained model do. The vocabulary is the default
model's, which is smaller than that of most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from lmserve.assets import SMOLLM2, fetch

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Keys = Callable[[gguf.GGUFWriter, "Shape"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's sizes, by GGUF's names."""

    architecture: str
    layers: int
    width: int
    inner: int  # of the feed-forward network, or of one expert
    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float
    matrix: Type = Type.Q4_K
    more_bits: Type = Type.Q6_K  # for what matters most
    attention: Type = Type.Q4_K
    experts: int = 0
    chosen: int = 0
    keys: Keys = field(default=lambda _writer, _shape: None)
    delta: bool = False  # three of four layers are gated delta nets


DELTA_HEADS: Final = 16
DELTA_DIM: Final = 128


def _qwen35(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(DELTA_DIM)
    writer.add_ssm_group_count(DELTA_HEADS)
    writer.add_ssm_time_step_rank(DELTA_HEADS)
    writer.add_ssm_inner_size(DELTA_HEADS * DELTA_DIM)
    writer.add_full_attention_interval(4)
    writer.add_rope_dimension_count(shape.head_dim // 4)
    writer.add_rope_dimension_sections([11, 11, 10, 0])


def _gpt_oss(writer: gguf.GGUFWriter, _shape: Shape) -> None:
    writer.add_sliding_window(128)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    writer.add_rope_scaling_orig_ctx_len(4096)


QWEN35: Final = Shape(
    architecture="qwen35",
    layers=24,
    width=1024,
    inner=3584,
    heads=8,
    kv_heads=2,
    head_dim=256,
    rope_base=1e7,
    keys=_qwen35,
    delta=True,
)

SHAPES: Final = {
    "llama-1b": Shape(
        architecture="llama", layers=16, width=2048, inner=8192, heads=32, kv_heads=8, head_dim=64, rope_base=5e5
    ),
    "qwen3.5-0.8b": QWEN35,
    "qwen3.5-2b": replace(QWEN35, width=2048, inner=6144),
    # 7 billion, 1.3 of them for each token.
    "olmoe": Shape(
        architecture="olmoe",
        layers=16,
        width=2048,
        inner=1024,
        heads=16,
        kv_heads=16,
        head_dim=128,
        rope_base=1e4,
        experts=64,
        chosen=8,
    ),
    # gpt-oss-20b's layers, half of them.
    "gpt-oss": Shape(
        architecture="gpt-oss",
        layers=12,
        width=2880,
        inner=2880,
        heads=64,
        kv_heads=8,
        head_dim=64,
        rope_base=1.5e5,
        matrix=Type.MXFP4,
        more_bits=Type.MXFP4,
        attention=Type.Q8_0,
        experts=32,
        chosen=4,
        keys=_gpt_oss,
    ),
}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    write(SHAPES[given.shape], given.file, f"random {given.shape}", copy_tokenizer)


def write(shape: Shape, file: Path, name: str, tokenizer: Callable[[gguf.GGUFWriter], int]) -> None:
    """Write the file of a model of that name. `tokenizer` writes one, and says how many tokens it has."""
    writer = gguf.GGUFWriter(file, shape.architecture)
    writer.add_name(name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.chosen)
        writer.add_expert_feed_forward_length(shape.inner)
    shape.keys(writer, shape)
    vocabulary = tokenizer(writer)
    writer.add_vocab_size(vocabulary)
    for tensor, sizes, kind in tensors(shape, vocabulary):
        stored = gguf.quant_shape_to_byte_shape(sizes, kind) if kind is not Type.F32 else sizes
        dtype = np.dtype(np.float32 if kind is Type.F32 else np.uint8)
        writer.add_tensor_info(tensor, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for tensor, sizes, kind in tensors(shape, vocabulary):
        writer.write_tensor_data(values(tensor, sizes) if kind is Type.F32 else blocks(random, sizes, kind))
    writer.close()


def copy_tokenizer(writer: gguf.GGUFWriter) -> int:
    """Copy the default model's tokenizer and chat template; how many tokens it has."""
    reader = gguf.GGUFReader(fetch(SMOLLM2))
    for key, found in reader.fields.items():
        if key.startswith("tokenizer."):
            kinds = found.types
            sub_type = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, found.contents(), kinds[0], sub_type=sub_type)
    return len(reader.fields["tokenizer.ggml.tokens"].contents())


def number_tokens(writer: gguf.GGUFWriter, count: int) -> int:
    """Write a vocabulary of so many tokens that no text is made of: it needs no file, and serves steps alone."""
    tokens = ["<|endoftext|>", *(f"t{token}" for token in range(1, count))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (count - 1)])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
    return count


def tensors(shape: Shape, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """Name, sizes and type of each tensor."""
    attention = shape.attention
    tied = not shape.experts
    embedding = shape.more_bits if tied else attention
    yield "token_embd.weight", (vocabulary, shape.width), embedding
    yield "output_norm.weight", (shape.width,), Type.F32
    if not tied:
        head = shape.more_bits if attention is Type.Q4_K else attention
        yield "output.weight", (vocabulary, shape.width), head
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        # As llama-quantize chooses them for Q4_K_M.
        more = layer < shape.layers // 8 or layer >= 7 * shape.layers // 8 or (layer - shape.layers // 8) % 3 == 2
        wide = shape.more_bits if more else shape.matrix
        yield f"{block}.attn_norm.weight", (shape.width,), Type.F32
        if shape.delta and layer % 4 != 3:
            yield from delta_net(shape, block)
        else:
            yield from self_attention(shape, block, shape.more_bits if more and attention is Type.Q4_K else attention)
        second = "post_attention_norm" if shape.architecture in ("qwen35", "gpt-oss") else "ffn_norm"
        yield f"{block}.{second}.weight", (shape.width,), Type.F32
        if not shape.experts:
            yield f"{block}.ffn_gate.weight", (shape.inner, shape.width), shape.matrix
            yield f"{block}.ffn_up.weight", (shape.inner, shape.width), shape.matrix
            yield f"{block}.ffn_down.weight", (shape.width, shape.inner), wide
            continue
        count = shape.experts
        yield f"{block}.ffn_gate_inp.weight", (count, shape.width), Type.F32
        yield f"{block}.ffn_gate_exps.weight", (count, shape.inner, shape.width), shape.matrix
        yield f"{block}.ffn_up_exps.weight", (count, shape.inner, shape.width), shape.matrix
        yield f"{block}.ffn_down_exps.weight", (count, shape.width, shape.inner), wide
        if shape.architecture == "gpt-oss":
            yield f"{block}.ffn_gate_inp.bias", (count,), Type.F32
            yield f"{block}.ffn_gate_exps.bias", (count, shape.inner), Type.F32
            yield f"{block}.ffn_up_exps.bias", (count, shape.inner), Type.F32
            yield f"{block}.ffn_down_exps.bias", (count, shape.width), Type.F32


def self_attention(shape: Shape, block: str, value: Type) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """The tensors of a layer with a KV cache."""
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kind = shape.attention
    # A delta net's neighbours have a gate beside each query.
    yield f"{block}.attn_q.weight", (query * (2 if shape.delta else 1), shape.width), kind
    yield f"{block}.attn_k.weight", (kv, shape.width), kind
    yield f"{block}.attn_v.weight", (kv, shape.width), value
    yield f"{block}.attn_output.weight", (shape.width, query), kind
    if shape.delta:
        yield f"{block}.attn_q_norm.weight", (shape.head_dim,), Type.F32
        yield f"{block}.attn_k_norm.weight", (shape.head_dim,), Type.F32
    if shape.architecture == "olmoe":
        yield f"{block}.attn_q_norm.weight", (query,), Type.F32
        yield f"{block}.attn_k_norm.weight", (kv,), Type.F32
    if shape.architecture == "gpt-oss":
        for name, size in (("attn_q", query), ("attn_k", kv), ("attn_v", kv), ("attn_output", shape.width)):
            yield f"{block}.{name}.bias", (size,), Type.F32
        yield f"{block}.attn_sinks.weight", (shape.heads,), Type.F32


def delta_net(shape: Shape, block: str) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """The tensors of a layer with a recurrent state."""
    inner = DELTA_HEADS * DELTA_DIM
    yield f"{block}.attn_qkv.weight", (3 * inner, shape.width), shape.matrix
    yield f"{block}.attn_gate.weight", (inner, shape.width), shape.matrix
    yield f"{block}.ssm_conv1d.weight", (3 * inner, 4), Type.F32
    yield f"{block}.ssm_dt.bias", (DELTA_HEADS,), Type.F32
    yield f"{block}.ssm_a", (DELTA_HEADS,), Type.F32
    yield f"{block}.ssm_alpha.weight", (DELTA_HEADS, shape.width), Type.Q8_0
    yield f"{block}.ssm_beta.weight", (DELTA_HEADS, shape.width), Type.Q8_0
    yield f"{block}.ssm_norm.weight", (DELTA_DIM,), Type.F32
    yield f"{block}.ssm_out.weight", (shape.width, inner), shape.matrix


def values(name: str, sizes: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """What is not quantized: norms of ones, decays of minus one, routers and convolutions of chance, biases of zero."""
    if name.endswith(".ssm_a"):
        return -np.ones(sizes, np.float32)
    if name.endswith((".bias", "sinks.weight")):
        return np.zeros(sizes, np.float32)
    if len(sizes) == 1:
        return np.ones(sizes, np.float32)
    random = np.random.default_rng(sum(name.encode()))
    return random.standard_normal(sizes, np.float32) / np.sqrt(np.float32(sizes[-1]))


def blocks(random: np.random.Generator, sizes: tuple[int, ...], kind: Type) -> Bytes:
    """Rows of random blocks of that type, with a mean of zero, whose products are as large as what they multiply."""
    stored = gguf.quant_shape_to_byte_shape(sizes, kind)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.frombuffer(random.bytes(int(np.prod(stored))), np.uint8).reshape(-1, size).copy()
    scale = 1 / np.sqrt(sizes[-1])
    match kind:
        case Type.Q4_K:
            # d * scale * q - dmin * min, with 6 bits a scale and a min, and 4 bits a q.
            raw[:, :4] = np.array([scale / 255, 7.5 * scale / 255], np.float16).view(np.uint8)
        case Type.Q6_K:
            # d * scale * (q - 32), with 8 bits a scale and 6 bits a q.
            raw[:, -2:] = np.array([scale / 1367], np.float16).view(np.uint8)
        case Type.Q8_0:
            raw[:, :2] = np.array([scale / 74], np.float16).view(np.uint8)
        case Type.MXFP4:
            # An exponent, then numbers of 4 bits up to 6.
            raw[:, 0] = 127 + round(np.log2(scale / 3.2))
        case _:
            raise ValueError(f"no blocks of {kind.name}")
    return raw.reshape(stored)


if __name__ == "__main__":
    main()
