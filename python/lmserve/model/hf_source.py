"""Reads a Hugging Face folder: what its json files say of the text side and of pooling."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmserve.model.config import EncoderConfig
from lmserve.model.errors import CheckpointError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
POOLING_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True, slots=True)
class TextSettings:
    """The text side of a checkpoint but for the tokenizer itself."""

    chat_template: str | None
    special_tokens: dict[str, str]
    eos_token_ids: list[int]


def read_json(path: Path) -> Any:
    """The file's JSON value, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def text_settings(folder: Path, config: dict[str, Any]) -> TextSettings:
    """Chat template, special tokens and end tokens of a Hugging Face folder."""
    tokenizer_config = read_object(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(read_object(folder / "special_tokens_map.json"))
    special_tokens |= _special_tokens(tokenizer_config)
    eos: list[int] = []
    for source in (read_object(folder / "generation_config.json"), config):
        ids = source.get("eos_token_id")
        eos += [ids] if isinstance(ids, int) else ids or []
    if "eos_token" in special_tokens:
        eos += _token_ids(folder, special_tokens["eos_token"])
    return TextSettings(_chat_template(folder, tokenizer_config), special_tokens, list(dict.fromkeys(eos)))


def apply_sentence_transformers(folder: Path, config: EncoderConfig) -> EncoderConfig:
    """The configuration with the pooling and the length limit of sentence-transformers' own files, where there are
    any.
    """
    limit = read_object(folder / "sentence_bert_config.json").get("max_seq_length")
    if limit:
        config = replace(config, context_length=min(config.context_length, int(limit)))
    modules = read_json(folder / "modules.json") or []
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            config = replace(config, pooling=_pooling(folder / str(module["path"]) / "config.json"))
        elif kind not in ("Transformer", "Normalize"):
            raise CheckpointError(
                f"{folder}/modules.json: module {kind} is not supported (Transformer, Pooling, Normalize are)"
            )
    return config


def _pooling(path: Path) -> str:
    raw = read_object(path)
    mode = raw.get("pooling_mode")
    modes = [mode] if mode else [key for key, on in raw.items() if key.startswith("pooling_mode") and on is True]
    found = [POOLING_FLAGS.get(mode, mode) for mode in modes]
    if len(found) != 1 or found[0] not in POOLING_FLAGS.values():
        given = ", ".join(map(str, found)) or "none"
        raise CheckpointError(f"{path}: pooling {given} is not supported (mean, cls are)")
    return str(found[0])


def read_object(path: Path) -> dict[str, Any]:
    """The file's JSON object, empty where there is no such file. Raises CheckpointError for anything else."""
    value = read_json(path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _special_tokens(source: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in SPECIAL_TOKENS:
        token = source.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[key] = text
    return found


def _token_ids(folder: Path, token: str) -> list[int]:
    added = read_object(folder / "tokenizer.json").get("added_tokens") or []
    return [int(entry["id"]) for entry in added if entry.get("content") == token]


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template", read_object(folder / "chat_template.json").get("chat_template"))
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
