"""Models for `embed_peers.py`, as folders and GGUF files: MiniLM with its own weights, larger ones with random weights.

The random models have MiniLM's tokenizer: every server sees the same tokens, and a vocabulary costs an encoder nothing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from lmserve.assets import MINILM, fetch
from safetensors import safe_open

MINILM_NAME: Final = "minilm"
# Which GGUF name of a pooling is which number.
POOLINGS: Final = {"mean": 1, "cls": 2, "lasttoken": 3}
SPECIAL: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class EmbeddingModel:
    """A model to measure. `config`: None for one with weights of its own."""

    name: str
    pooling: str
    longest: int  # tokens of a text, special ones included
    config: dict[str, Any] | None = None
    kind: str = "Bert"
    dtype: str = "float32"


MODELS: Final = {
    model.name: model
    for model in (
        EmbeddingModel(MINILM_NAME, "mean", 256),
        # What follows the embedding of words is the same in XLM-R and in BERT.
        EmbeddingModel(
            "bge-m3",
            "cls",
            400,
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "max_position_embeddings": 8192,
                "type_vocab_size": 1,
            },
        ),
        EmbeddingModel(
            "qwen3-embedding-0.6b",
            "lasttoken",
            400,
            {
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 32768,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            },
            kind="Qwen3",
            dtype="bfloat16",
        ),
    )
}


def vocabulary(folder: Path) -> list[str]:
    """MiniLM's tokens, by their ids."""
    tokens: dict[str, int] = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return sorted(tokens, key=tokens.__getitem__)


def model_folder(model: EmbeddingModel, cache: Path) -> Path:
    """The model as a folder of sentence-transformers; written if it is not there."""
    source, folder = fetch(MINILM), cache / model.name
    if (folder / "done").exists():
        return folder
    if model.config is None:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.lmserve"))
        (folder / "done").touch()
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPECIAL:
        shutil.copy(source / name, folder)
    config = getattr(transformers, f"{model.kind}Config")(vocab_size=len(vocabulary(source)), **model.config)
    torch.manual_seed(0)
    made = getattr(transformers, f"{model.kind}Model")(config).to(getattr(torch, model.dtype))
    made.save_pretrained(folder)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {f"pooling_mode_{name}": name.startswith(model.pooling) for name in ("mean_tokens", "cls_token")}
    flags["pooling_mode_lasttoken"] = model.pooling == "lasttoken"
    pooling = {"word_embedding_dimension": config.hidden_size} | flags
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    shutil.copy(source / "modules.json", folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8192, "do_lower_case": False}))
    (folder / "done").touch()
    return folder


def gguf_file(model: EmbeddingModel, folder: Path, cache: Path, kind: Type) -> Path:
    """The folder's model as a GGUF file, matrices of this type; written if it is not there."""
    path = cache / f"{model.name}-{kind.name}.gguf"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    config = transformers.AutoConfig.from_pretrained(folder)
    qwen3 = config.model_type == "qwen3"
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen3" if qwen3 else "bert")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_pooling_type(gguf.PoolingType(POOLINGS[model.pooling]))
    if qwen3:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_token_type_count(config.type_vocab_size)
        writer.add_causal_attention(False)
    _add_tokenizer(writer, vocabulary(folder))
    architecture = gguf.MODEL_ARCH.QWEN3 if qwen3 else gguf.MODEL_ARCH.BERT
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
            own = f"model.{name}" if qwen3 and not name.startswith("model.") else name
            target = names.get_name(own, (".weight", ".bias"))
            if target is None or "pooler" in name or "position_ids" in name:
                continue
            values = tensors.get_tensor(name).float().numpy()
            matrix = values.ndim == 2 and ("blk." in target or target.startswith("token_embd"))
            stored = gguf.quantize(values, kind) if matrix else values
            writer.add_tensor(target, stored, raw_dtype=kind if matrix else Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, tokens: list[str]) -> None:
    """WordPiece as llama.cpp's converter writes it: a word's first piece has a mark, further ones lose theirs."""

    def stored(token: str) -> str:
        if token.startswith("[") and token.endswith("]"):
            return token
        return token[2:] if token.startswith("##") else f"\u2581{token}"

    special = {name: tokens.index(name) for name in ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")}
    kinds = np.full(len(tokens), gguf.TokenType.NORMAL.value)
    kinds[list(special.values())] = gguf.TokenType.CONTROL.value
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("bert")
    writer.add_token_list([stored(token) for token in tokens])
    writer.add_token_types(kinds.tolist())
    writer.add_unk_token_id(special["[UNK]"])
    writer.add_sep_token_id(special["[SEP]"])
    writer.add_pad_token_id(special["[PAD]"])
    writer.add_bos_token_id(special["[CLS]"])
    writer.add_eos_token_id(special["[SEP]"])
    writer.add_mask_token_id(special["[MASK]"])
