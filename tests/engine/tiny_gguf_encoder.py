"""Writes transformers' encoders as GGUF files, the way llama.cpp's converter does."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np

BERT = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.LayerNorm": "token_embd_norm",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.position_embeddings": "position_embd",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
    "pooler.dense": "cls",
    "classifier": "cls.output",
    "classifier.dense": "cls",
    "classifier.out_proj": "cls.output",
}
NOMIC = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.LayerNorm": "token_embd_norm",
    "embeddings.token_type_embeddings": "token_types",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "attn_output_norm",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "post_mlp_layernorm": "layer_output_norm",
}
MODERN = {
    "embeddings.tok_embeddings": "token_embd",
    "embeddings.norm": "token_embd_norm",
    "final_norm": "output_norm",
    "attn_norm": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.Wo": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.Wi": "ffn_up",
    "mlp.Wo": "ffn_down",
    "head.dense": "cls",
    "head.norm": "cls.norm",
    "classifier": "cls.output",
}
GEMMA = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {"bert": BERT, "nomic-bert": NOMIC, "modern-bert": MODERN, "gemma-embedding": GEMMA}


def write(path: Path, model, architecture: str, *, pooling: int, extra: dict | None = None, padding: int = 0) -> None:
    """extra: further tensors. padding: rows of the table of positions that no token has."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_pooling_type(gguf.PoolingType(pooling))
    writer.add_causal_attention(False)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings - padding)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gemma-embedding":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        # transformers has half of it on each side, and the token itself.
        writer.add_sliding_window(2 * (config.sliding_window - 1))
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    else:
        writer.add_layer_norm_eps(config.norm_eps if architecture == "modern-bert" else config.layer_norm_eps)
    if architecture == "nomic-bert":
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "modern-bert":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_sliding_window(config.local_attention)
    if pooling == 4:
        writer.add_tokenizer_model("bert" if config.model_type == "bert" else "t5")
        writer.add_sep_token_id(99)
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    for name in [name for name in tensors if ".q_proj." in name and architecture == "nomic-bert"]:
        parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        tensors[name.replace("q_proj", "qkv_proj")] = np.concatenate(parts)
    for name, values in tensors.items():
        stem, _, kind = re.sub(r"^(bert|roberta|model)\.", "", name).rpartition(".")
        found = re.fullmatch(r"(?:encoder\.)?layers?\.(\d+)\.(.+)", stem)
        names = NAMES[architecture]
        target = names[stem] if found is None else f"blk.{found[1]}.{names[found[2]]}"
        shift = np.float32(architecture == "gemma-embedding" and stem.endswith("norm"))
        stored = values[padding:] if target == "position_embd" else values
        writer.add_tensor(f"{target}.{kind}", np.ascontiguousarray(stored + shift))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


NOMIC_EXPERTS = {
    "embeddings.word_embeddings": "token_embd",
    "emb_ln": "token_embd_norm",
    "embeddings.token_type_embeddings": "token_types",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "norm1": "attn_output_norm",
    "norm2": "layer_output_norm",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mlp.router.layer": "ffn_gate_inp",
    "mlp.experts.mlp.w1": "ffn_up_exps",
    "mlp.experts.mlp.w2": "ffn_down_exps",
}


def write_nomic_experts(path: Path, tensors: dict, config: dict) -> None:
    """A model as nomic-embed-text-v2-moe; tensors and config as its publisher has them."""
    writer = gguf.GGUFWriter(path, "nomic-bert-moe")
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_causal_attention(False)
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_rope_freq_base(config["rotary_emb_base"])
    writer.add_moe_every_n_layers(config["moe_every_n_layers"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["moe_top_k"])
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        values = tensor.numpy()
        if kind in ("w1", "w2"):
            stem, kind = name, "weight"
            values = values.reshape(config["num_experts"], config["n_inner"], config["n_embd"])
            values = values if name.endswith("w1") else values.transpose(0, 2, 1)
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", stem)
        target = NOMIC_EXPERTS[stem] if found is None else f"blk.{found[1]}.{NOMIC_EXPERTS[found[2]]}"
        writer.add_tensor(f"{target}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
