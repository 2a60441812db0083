"""Opens a model on disk, a GGUF file or a Hugging Face folder, without torch and without reading its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmserve._core import GgufFile, Tokenizer
from lmserve.loading import reading
from lmserve.model import families, files, gguf_source, hf_source
from lmserve.model.answer_head import FRAME, answer_head, answer_tokens, answers
from lmserve.model.config import EncoderConfig, ModelConfig
from lmserve.model.embedding import MEAN, Embedding, named
from lmserve.model.errors import CheckpointError, UnknownArchitectureError
from lmserve.model.families.family import ANY, Decoder, Family, Tensors
from lmserve.model.generation_defaults import (
    GENERATION_CONFIG,
    GenerationDefaults,
    from_generation_config,
    from_gguf,
)
from lmserve.model.lower_case import with_case
from lmserve.model.ops import Ops
from lmserve.model.quantization import read_quantization
from lmserve.model.quantized_source import restore
from lmserve.model.rope import head_order
from lmserve.model.safetensors_source import read_safetensors
from lmserve.model.score_head import read_scores, scores_pairs
from lmserve.model.sentence_transformers import MODULES, check_layers, max_length, read_embedding
from lmserve.model.tensors import TensorSource
from lmserve.model.wrapped import text_config, text_tensors

GGUF_MAGIC = b"GGUF"
# Of layers, heads, widths and lengths: beyond it a file is damaged, or made to harm.
MOST = 1 << 31
ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk. `tensors` have canonical names and are checked to be all there, in the shapes of `config`."""

    path: Path
    name: str
    family: Family
    kind: str  # "generate" or "embed"
    config: ModelConfig
    embedding: Embedding
    tensors: Mapping[str, TensorSource]
    chat_template: str | None
    tool_template: str | None  # for requests with tools, where it is another one
    special_tokens: dict[str, str]  # "bos_token", "eos_token", ...: the names that chat templates use
    eos_token_ids: list[int]
    generation: GenerationDefaults  # what its publisher samples with
    notes: tuple[str, ...] = ()  # notes for the operator

    def load(self, ops: Ops[Any, Any]) -> Decoder[Any, Any]:
        """The model, its weights loaded into `ops`."""
        return self.family.load(self.config, self.tensors, ops)

    @property
    def max_model_len(self) -> int:
        """Longest sequence, in tokens, that the model is made for."""
        return self.config.context_length

    def tokenizer(self) -> Tokenizer:
        """The core's tokenizer, read from the checkpoint."""
        if self.path.is_file():
            return Tokenizer.from_gguf(GgufFile(self.path))
        data = files.read_file(self.path / "tokenizer.json", files.MAX_TOKENIZER)
        if data is None:
            raise CheckpointError(f"{self.path} has no tokenizer.json (other tokenizer files must be converted to it)")
        return Tokenizer.from_json(with_case(data, self.path))


def open_checkpoint(path: str | Path, *, mtp: bool = False) -> Checkpoint:
    """Open a GGUF file, or a folder with config.json, tokenizer.json and safetensors files.

    mtp: with the head that guesses a token ahead.

    Raises CheckpointError: no such path, an unsupported architecture or storage type, a truncated file, a missing
    tensor or one of the wrong shape; no such head.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path, mtp=mtp)
    with reading(f"the header of {path}"):
        return _open_file(path, mtp=mtp)


def _open_file(path: Path, *, mtp: bool) -> Checkpoint:
    if not files.check_regular(path):
        raise CheckpointError(f"{path}: there is no such file or folder")
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file (it starts with {magic!r}); a safetensors model is a folder")
    return _open_gguf(path, mtp=mtp)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a file at `path` says may be of any kind: whatever goes wrong is said in one line that names it."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, IndexError) as error:
        raise CheckpointError(f"{path}: it holds a value of the wrong kind: {error}") from error


def _open_folder(folder: Path, *, mtp: bool) -> Checkpoint:
    with reading(f"the configuration of {folder}"):
        raw = files.read_json(folder / "config.json")
    if raw is None:
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder / 'config.json'} must hold an object, but holds {type(raw).__name__}")
    notes: tuple[str, ...] = ()
    with _reading(folder), reading(f"the configuration of {folder}"):
        inner = text_config(raw)
        scores, answer = scores_pairs(raw), answer_tokens(folder, raw)
        pooled = scores or answer is not None or (folder / MODULES).is_file()
        try:
            family = families.hf_family(raw if inner is None else inner, pooled=pooled)
        except UnknownArchitectureError as error:
            if pooled or mtp:
                raise
            return _open_by_transformers(folder, raw, error)
        config = family.hf_config(raw if inner is None else inner)
        text = hf_source.text_settings(folder, raw if inner is None else raw | inner)
        generation = from_generation_config(files.read_object(folder / GENERATION_CONFIG))
        with reading(f"the headers of the weights in {folder}"):
            stored = _read_weights(folder, raw if inner is None else inner)
        segments = _segments(folder, config, text.special_tokens)
        if scores:
            embedding = read_scores(raw, stored, segments, config)
        elif answer is not None:
            embedding = answers(answer_head(answer, stored), FRAME)
        else:
            embedding = dataclasses.replace(read_embedding(folder, raw), segments=segments)
        if pooled and family.kind == "generate":
            stored, config = _without_head(stored, config, raw)
        if family.kind == "generate" and not pooled and not config.attention[0].causal:
            raise CheckpointError("its tokens see those after them, so that it embeds; but modules.json is missing")
        if pooled and embedding.scores is None and not embedding.dimensions:
            own = gguf_source.DIMENSIONS.get(family.name, ())
            embedding = dataclasses.replace(embedding, dimensions=own)
        if family.kind == "embed" or pooled:
            limit = max_length(folder) or config.context_length
            config = dataclasses.replace(config, context_length=min(config.context_length, limit))
        check_layers(embedding, config.hidden_size)
        if inner is not None:
            stored, others = text_tensors(stored)
            notes = (f"served text-only: {others} tensors that see or hear are not loaded",)
        if mtp:
            config = _with_mtp(family, config, stored)
        tensors = family.hf_tensors(stored, config)
    kind = "embed" if pooled else family.kind
    return _checked(folder, family, kind, config, embedding, tensors, text, generation, notes)


def _with_mtp(family: Family, config: ModelConfig, stored: Mapping[str, TensorSource]) -> ModelConfig:
    if family.mtp is None:
        raise CheckpointError(f"no head that guesses tokens ahead (MTP) is known of models of {family.name}")
    layer = config.num_layers
    names = ("mtp.", "model.mtp.", f"blk.{layer}.nextn.", f"model.layers.{layer}.")
    if not any(name.startswith(names) for name in stored):
        raise CheckpointError("it has no head that guesses tokens ahead (MTP)")
    return family.mtp(config)


def _segments(folder: Path, config: ModelConfig, special_tokens: Mapping[str, str]) -> tuple[int, int] | None:
    """`Embedding.segments` of a model that adds something to words by their segment."""
    if not isinstance(config, EncoderConfig) or config.num_segments is None:
        return None
    if config.num_segments == 1:
        return None if config.num_positions is not None else (-1, 0)
    separator = hf_source.added_tokens(folder).get(special_tokens.get("sep_token", "[SEP]"))
    if separator is None:
        raise CheckpointError("the model tells two texts apart, but tokenizer.json has no sep_token between them")
    return separator, config.num_positions or 0


def _without_head(stored: Tensors, config: ModelConfig, raw: dict[str, Any]) -> tuple[Tensors, ModelConfig]:
    """A decoder's tensors and configuration without the head that generates, and the heads that score."""
    if raw.get("is_causal") is False or (raw.get("use_bidirectional_attention") and config.attention[0].causal):
        raise CheckpointError("decoders of this family whose tokens see those after them are not supported")
    heads = ("lm_head.", "score.")
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(heads)}
    if "embed_tokens.weight" in kept:
        kept = {f"model.{name}": tensor for name, tensor in kept.items()}
    return kept, dataclasses.replace(config, tie_word_embeddings=True)


def _open_by_transformers(folder: Path, raw: dict[str, Any], unknown: UnknownArchitectureError) -> Checkpoint:
    try:
        # Imported late: it brings torch.
        from lmserve.model import transformers_model
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        way = "pip install 'lmserve[transformers]' may run it, slower, through transformers"
        raise CheckpointError(f"{unknown}; {way}") from unknown
    inner = text_config(raw)
    notes = ["runs through transformers, which is slower than a family of its own"]
    if inner is not None:
        notes.append("served text-only: what sees or hears is not loaded")
    try:
        config = transformers_model.describe(raw if inner is None else inner)
    except CheckpointError as error:
        raise CheckpointError(f"{unknown}; nor does it run through transformers: {error}") from error
    text = hf_source.text_settings(folder, raw if inner is None else raw | inner)
    with reading(f"the headers of the weights in {folder}"):
        tensors = read_safetensors(folder)
    tensors = tensors if inner is None else text_tensors(tensors)[0]
    _check_numbers(folder, config)
    return Checkpoint(
        path=folder,
        name=folder.resolve().name,
        family=ANY,
        kind="generate",
        config=config,
        embedding=MEAN.of_width(config.hidden_size),
        tensors=tensors,
        chat_template=text.chat_template,
        tool_template=text.tool_template,
        special_tokens=text.special_tokens,
        eos_token_ids=text.eos_token_ids,
        generation=from_generation_config(files.read_object(folder / GENERATION_CONFIG)),
        notes=tuple(notes),
    )


def _read_weights(folder: Path, raw: dict[str, Any]) -> Tensors:
    stored = read_safetensors(folder)
    try:
        return restore(stored, read_quantization(raw))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: quantization_config holds a value of the wrong kind: {error}") from error


def _open_gguf(path: Path, *, mtp: bool) -> Checkpoint:
    header = gguf_source.open_header(path)
    first = gguf_source.shards_of(path, header)[0]
    if first != path:
        # The first has the metadata.
        return _open_gguf(first, mtp=mtp)
    with _reading(path):
        architecture = str(header.get("general.architecture"))
        experts = bool(header.get(f"{architecture}.expert_count"))
        family = families.gguf_family(architecture, experts=experts)
        stored = gguf_source.read_tensors(path, header)
        metadata, interleaved = header.metadata(), family.gguf_interleaved_rope
        config = family.read_gguf(gguf_source.GgufModel(path, architecture, metadata, header.get, stored, interleaved))
        if mtp:
            config = _with_mtp(family, config, stored)
        generation = from_gguf(metadata)
        tensors = family.gguf_tensors(dict(gguf_source.canonical_names(stored, family.gguf_names)), config)
        text = gguf_source.text_settings(header)
        pooling = header.get(f"{architecture}.pooling_type")
        embedding, kind, notes = MEAN, family.kind, tuple[str, ...]()
        if pooling is not None:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.")}
            embedding, kind = _gguf_embedding(pooling, architecture, header, stored, family, config), "embed"
            config = dataclasses.replace(config, tie_word_embeddings=True)
        segments = _gguf_segments(header, config)
        embedding = dataclasses.replace(embedding, segments=segments)
        check_layers(embedding, config.hidden_size)
        if family.name == "gemma_embedding" and not embedding.layers:
            notes = ("the file has no dense layers (dense_2, dense_3), so that its vectors are not the publisher's",)
    return _checked(path, family, kind, config, embedding, tensors, text, generation, notes)


def _gguf_embedding(
    pooling: Any,
    architecture: str,
    header: GgufFile,
    stored: Mapping[str, TensorSource],
    family: Family,
    config: ModelConfig,
) -> Embedding:
    if pooling != gguf_source.RANKS:
        return gguf_source.pooled(pooling, family.name, stored)
    labels = header.get(f"{architecture}.classifier.output_labels")
    return gguf_source.ranked(labels, stored, decoder=not isinstance(config, EncoderConfig), eps=config.norm_eps)


def _gguf_segments(header: GgufFile, config: ModelConfig) -> tuple[int, int] | None:
    """As `_segments`."""
    if not isinstance(config, EncoderConfig) or config.num_segments is None:
        return None
    if config.num_segments == 1:
        return None if config.num_positions is not None else (-1, 0)
    separator = header.get("tokenizer.ggml.seperator_token_id")
    if not isinstance(separator, int):
        raise CheckpointError("the model tells two texts apart, but no token stands between them")
    return separator, config.num_positions or 0


def _checked(
    path: Path,
    family: Family,
    kind: str,
    config: ModelConfig,
    embedding: Embedding,
    tensors: Tensors,
    text: hf_source.TextSettings,
    generation: GenerationDefaults,
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    _check_numbers(path, config)
    expected = family.expected_tensors(config)
    for tensor, shape in expected.items():
        found = tensors.get(tensor)
        if found is None:
            raise CheckpointError(f"{path}: tensor {tensor} is missing")
        if found.shape != shape:
            raise CheckpointError(
                f"{path}: tensor {found.name} has shape {list(found.shape)}, the configuration needs {list(shape)}"
            )
    _refuse_unknown(path, tensors, expected)
    name = gguf_source.name_of(path) if path.is_file() else path.resolve().name
    return Checkpoint(
        path=path,
        name=name,
        family=family,
        kind=kind,
        config=config,
        embedding=named(embedding.of_width(config.hidden_size), family.name, name),
        tensors=_rotated_half_apart({tensor: tensors[tensor] for tensor in expected}, config),
        chat_template=text.chat_template,
        tool_template=text.tool_template,
        special_tokens=text.special_tokens,
        eos_token_ids=text.eos_token_ids,
        generation=generation,
        notes=notes,
    )


def _rotated_half_apart(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The tensors with the elements of each head of q and k in the order that rope tables are made for."""
    reordered = dict(tensors)
    for index, layer in zip(config.attention_places, config.attention, strict=True):
        if layer.rope is None or layer.latent_rank is not None:
            continue
        order = head_order(layer.rope, layer.head_dim)
        if order is None:
            continue
        for part in ROTATED:
            for kind in ("weight", "bias"):
                name = f"model.layers.{index}.self_attn.{part}.{kind}"
                if name in tensors:
                    heads = np.arange(tensors[name].shape[0] // layer.head_dim)[:, None]
                    reordered[name] = tensors[name].select_rows((heads * layer.head_dim + order).reshape(-1))
    return reordered


def _check_numbers(path: Path, config: ModelConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is int and value < 1:
            raise CheckpointError(f"{path}: {field.name} is {value}; it must be at least 1")
        if type(value) is int and value > MOST:
            raise CheckpointError(f"{path}: {field.name} is {value}; it must be at most {MOST}")
        # `not` around the comparison, so that NaN is refused too.
        if field.name.endswith("_eps") and not 0 <= value <= 1:
            raise CheckpointError(f"{path}: {field.name} is {value}; it must lie in [0, 1]")
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{path}: num_heads {config.num_heads} is no multiple of num_kv_heads {config.num_kv_heads}"
        )
    if config.head_dim % 2 and not isinstance(config, EncoderConfig):
        raise CheckpointError(f"{path}: head_dim {config.head_dim} is odd; rotary embedding needs an even one")


def _refuse_unknown(path: Path, tensors: Tensors, expected: Mapping[str, Any]) -> None:
    # A tensor that no code reads is a part of the model that would silently be left out. Only these are known not to
    # matter: a head beside tied embeddings, stored rotation frequencies, and the zeros that quantizers add as biases.
    for tensor in sorted(tensors.keys() - expected.keys()):
        known = tensor == "lm_head.weight" or tensor.endswith("rotary_emb.inv_freq")
        if not known and not (tensor.endswith(".bias") and not tensors[tensor].dequantize().any()):
            raise CheckpointError(f"{path}: tensor {tensor} is not one of a supported model")
