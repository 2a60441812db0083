"""Writes a transformers model as a GGUF file, the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def write(path: Path, model, architecture: str, dtype: str = "F32") -> None:
    """Write the model with its matrices stored as dtype, and give the model the values that were stored."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    _write_vocabulary(writer, config.vocab_size)
    _write_rope(writer, config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = dict(model.named_parameters())
    for name, parameter in tensors.items():
        stem, kind = name.rsplit(".", 1)
        prefix, _, rest = stem.removeprefix("model.layers.").partition(".")
        target = f"blk.{prefix}.{NAMES[rest]}" if stem not in NAMES else NAMES[stem]
        values = parameter.detach().numpy()
        rows = np.arange(len(values))
        if architecture in ("llama", "internlm2") and stem.rsplit(".", 1)[-1] in heads:
            rows = rows.reshape(heads[stem.rsplit(".", 1)[-1]], 2, -1).swapaxes(1, 2).reshape(-1)
        storage = Type[dtype] if values.ndim == 2 else Type.F32
        stored = quantize(values, storage)
        restored = gguf.dequantize(stored, storage).reshape(values.shape)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(restored))
        writer.add_tensor(f"{target}.{kind}", np.ascontiguousarray(stored[rows]), raw_dtype=storage)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(values: np.ndarray, storage: Type) -> np.ndarray:
    """Blocks of the values; of a K type, for which gguf only reads, random blocks of like magnitude."""
    if storage not in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
        return gguf.quantize(values, storage)
    elements, size = gguf.GGML_QUANT_SIZES[storage]
    generator = np.random.default_rng(values.shape[1])
    blocks = generator.integers(0, 256, (values.size // elements, size), np.uint8)
    # The two block scales: first in Q4_K and Q5_K, the last two bytes in Q6_K (which has one).
    scale = np.array([2e-4, 1e-4] if storage != Type.Q6_K else [4e-5], np.float16).view(np.uint8)
    if storage == Type.Q6_K:
        blocks[:, -2:] = scale
    else:
        blocks[:, :4] = scale
    return blocks.reshape(len(values), -1)


def _write_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"t{i}" for i in range(3, size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)


def _write_rope(writer: gguf.GGUFWriter, config) -> None:
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32))
