"""Tensors and configuration of a GGUF file: the header through the core, the tensor data mapped and not read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmserve._core import END_OF_TURN, GgufFile
from lmserve.errors import LmserveError
from lmserve.model.answer_head import FRAME, answers
from lmserve.model.config import RopeConfig
from lmserve.model.embedding import DenseLayer, Embedding, VectorNorm
from lmserve.model.errors import CheckpointError
from lmserve.model.expert_tensors import split, stack
from lmserve.model.hf_source import TextSettings, check_template, without_ends_of_messages
from lmserve.model.rope_config import gguf_rope
from lmserve.model.tensors import PLAIN_TYPES, QUANTIZED_TYPES, ScaledTensor, StoredTensor, TensorSource

# GGUF's tensor names and the canonical ones (those of Hugging Face's Llama).
GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
VOCABULARY = "tokenizer.ggml"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad"}
# Values of the key pooling_type; that of models that rank needs a head.
POOLING_TYPES: dict[int, str | None] = {0: None, 1: "mean", 2: "cls", 3: "last"}
RANKS = 4
ANSWERS = ("yes", "no")
# Dense layers after pooling, of EmbeddingGemma.
DENSE = ("dense_2.weight", "dense_3.weight")
# Lengths that vectors may be cut to, of families whose files have no key for it.
DIMENSIONS: dict[str, tuple[int, ...]] = {"qwen3": (0,), "gemma_embedding": (128, 256, 512)}
ROPE_FACTORS = ("rope_freqs", "rope_factors_short", "rope_factors_long")


def open_header(path: Path) -> GgufFile:
    """Read the header of a GGUF file."""
    try:
        return GgufFile(path)
    except LmserveError as error:
        raise CheckpointError(str(error)) from error


def name_of(path: Path) -> str:
    """The model's name, from that of its file or of one of its files."""
    match = SHARD.fullmatch(path.name)
    return path.stem if match is None else match[1]


def shards_of(path: Path, header: GgufFile) -> list[Path]:
    """All files of the model at `path`: those into which gguf-split cut it, or `path` alone.

    Raises CheckpointError for a missing file.
    """
    count = header.get("split.count")
    if not count or count == 1:
        return [path]
    match = SHARD.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} files, which must be named like it, ending in -00001-of-{count:05}"
        )
    shards = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{path} is one of {count} files, but {shard} is missing")
    return shards


def read_tensors(path: Path, header: GgufFile) -> dict[str, StoredTensor]:
    """Every tensor by its GGUF name, those of all shards."""
    tensors: dict[str, StoredTensor] = {}
    for shard in shards_of(path, header):
        tensors |= _read_file(shard, header if shard == path else open_header(shard))
    total = header.get("split.tensors.count")
    if total and total != len(tensors):
        raise CheckpointError(f"{path}: its files must have {total} tensors, but have {len(tensors)}")
    return tensors


def _read_file(path: Path, header: GgufFile) -> dict[str, StoredTensor]:
    mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
    tensors: dict[str, StoredTensor] = {}
    for name, dtype, shape, offset, nbytes in header.tensors():
        start = header.data_offset + offset
        if start + nbytes > len(mapped):
            raise CheckpointError(
                f"{path} is truncated: {name} ends at byte {start + nbytes}, but the file has {len(mapped)}"
            )
        tensors[name] = _stored(path, name, dtype, shape, mapped[start : start + nbytes])
    return tensors


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What a family reads its configuration from. `tensors` have their GGUF names."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]  # without long arrays
    lookup: Callable[[str], Any]  # of any key, None where there is none
    tensors: Mapping[str, StoredTensor]
    interleaved: bool  # each rotated pair lies in adjacent rows of q and k

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture. Raises CheckpointError where there is neither it nor a default."""
        found = self.lookup(f"{self.architecture}.{key}")
        if found is None:
            found = default
        if found is None:
            raise CheckpointError(f"{self.path}: the key {self.architecture}.{key} is missing")
        return found

    def rope(self, head_dim: int) -> RopeConfig:
        """The rotation, scaled as the file says."""
        return gguf_rope(
            self.metadata,
            self.architecture,
            head_dim=head_dim,
            context_length=int(self.value("context_length")),
            factors=_rope_factors(self.tensors),
            interleaved=self.interleaved,
        )

    def plain_rope(self, theta_key: str, default_theta: float) -> RopeConfig:
        """A rotation that is not scaled, with the theta of this key."""
        theta = float(self.value(f"rope.{theta_key}", default_theta))
        return RopeConfig(theta=theta, interleaved=self.interleaved)


def canonical_names(tensors: Mapping[str, StoredTensor], names: Mapping[str, str]) -> dict[str, TensorSource]:
    """The tensors under Hugging Face's names; rope tables, which the configuration holds, are left out.

    `names`: the family's names that differ from Llama's.
    """
    renamed: dict[str, TensorSource] = {}
    for name, tensor in scaled(tensors).items():
        if name.removesuffix(".weight") not in ROPE_FACTORS:
            renamed[_canonical(name, GLOBAL_NAMES | LAYER_NAMES | dict(names))] = tensor
    return renamed


def scaled(tensors: Mapping[str, StoredTensor]) -> dict[str, TensorSource]:
    """The tensors, those of NVFP4 times their `scale`: a number for the tensor, or one for each expert.

    `input_scale` is that of activations in four bits, which are not computed here.
    """
    whole: dict[str, TensorSource] = dict(tensors)
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind != "weight" or tensor.dtype != "NVFP4":
            continue
        whole.pop(f"{stem}.input_scale", None)
        scale = whole.pop(f"{stem}.scale", None)
        if scale is None:
            continue
        factors = scale.dequantize().reshape(-1).tolist()
        if len(factors) == 1:
            whole[name] = ScaledTensor(tensor, factors[0], stored=True)
        elif len(factors) == tensor.shape[0]:
            parts = zip(split(tensor), factors, strict=True)
            whole[name] = stack(name, [ScaledTensor(part, factor, stored=True) for part, factor in parts])
        else:
            raise CheckpointError(f"tensor {stem}.scale has {len(factors)} numbers, but {name} {tensor.shape[0]} rows")
    return whole


def pooled(kind: Any, family: str, stored: Mapping[str, TensorSource]) -> Embedding:
    """What a file's key `pooling_type` says, with its dense layers. Raises CheckpointError for a type that is not
    supported.
    """
    if kind not in POOLING_TYPES:
        known = ", ".join(f"{number} ({name or 'none'})" for number, name in POOLING_TYPES.items())
        raise CheckpointError(f"pooling_type {kind!r} is not supported ({known} are, and 4 with a head)")
    dense = tuple(DenseLayer(stored[name]) for name in DENSE if name in stored)
    return Embedding(pooling=POOLING_TYPES[kind], layers=dense, dimensions=DIMENSIONS.get(family, ()))


def ranked(labels: Any, stored: Mapping[str, TensorSource], *, decoder: bool, eps: float) -> Embedding:
    """What a model of pooling type 4 does, with the tensors under `cls` and its labels. Raises CheckpointError for a
    head of another form.
    """
    head = stored.get("cls.output.weight")
    if head is None:
        raise CheckpointError("pooling_type 4 needs a head, but tensor cls.output.weight is missing")
    names = tuple(labels) if isinstance(labels, list) else ()
    if decoder and names == ANSWERS and head.shape[0] == len(names):
        return answers(head, FRAME)
    layers: tuple[DenseLayer, ...] = (DenseLayer(head, stored.get("cls.output.bias")),)
    if "cls.weight" in stored:
        norm = stored.get("cls.norm.weight")
        form = "tanh" if norm is None else "gelu"
        own = None if norm is None else VectorNorm(norm, stored.get("cls.norm.bias"), eps)
        layers = (DenseLayer(stored["cls.weight"], stored.get("cls.bias"), form, own), *layers)
    return Embedding(
        pooling="last" if decoder else "cls",
        layers=layers,
        scores="sigmoid",
        labels=names or tuple(f"LABEL_{index}" for index in range(head.shape[0])),
    )


def text_settings(header: GgufFile) -> TextSettings:
    """Chat template, special tokens and end tokens of a GGUF file."""
    metadata = header.metadata()
    tokens = header.get(f"{VOCABULARY}.tokens") or []
    special_tokens: dict[str, str] = {}
    for key, name in SPECIAL_TOKENS.items():
        token = metadata.get(f"{VOCABULARY}.{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            special_tokens[f"{name}_token"] = tokens[token]
    eos = [metadata.get(f"{VOCABULARY}.{key}_token_id") for key in ("eos", "eot", "eom")]
    # Many files name only the end of a document and leave the end of a turn to its well-known text.
    eos += [index for index, token in enumerate(tokens) if token in END_OF_TURN]
    templates = {
        name: metadata.get(f"tokenizer.chat_template{suffix}")
        for name, suffix in (("default", ""), ("tool_use", ".tool_use"))
    }
    found = {name: template for name, template in templates.items() if isinstance(template, str)}
    for name, template in found.items():
        check_template(f"chat template {name}", template)
    known = set(tokens)
    end = tokens.index("<|end|>") if "<|end|>" in known else None
    ends = [token for token in dict.fromkeys(eos) if isinstance(token, int)]
    return TextSettings(
        chat_template=found.get("default"),
        tool_template=found.get("tool_use"),
        special_tokens=special_tokens,
        eos_token_ids=without_ends_of_messages(ends, known, end),
    )


def _rope_factors(tensors: Mapping[str, StoredTensor]) -> dict[str, list[float]]:
    return {
        name: tensors[f"{name}.weight"].dequantize().tolist() for name in ROPE_FACTORS if f"{name}.weight" in tensors
    }


def _canonical(name: str, names: Mapping[str, str]) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in names:
        return f"{names[stem]}.{kind}"
    parts = stem.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in names:
        return f"model.layers.{parts[1]}.{names[parts[2]]}.{kind}"
    return name


def _stored(path: Path, name: str, dtype: str, shape: tuple[int, ...], data: NDArray[np.uint8]) -> StoredTensor:
    if dtype in PLAIN_TYPES:
        return StoredTensor(name, shape, dtype, data.view(PLAIN_TYPES[dtype]).reshape(shape))
    if dtype not in QUANTIZED_TYPES:
        supported = ", ".join((*PLAIN_TYPES, *QUANTIZED_TYPES))
        raise CheckpointError(f"{path}: {name} is stored as {dtype}, which is not supported ({supported} are)")
    return StoredTensor(name, shape, dtype, data.reshape(math.prod(shape[:-1]), -1))
