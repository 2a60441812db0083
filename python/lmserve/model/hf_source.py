"""Reads a Hugging Face folder: what its json files say of the text side."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from lmserve._core import END_OF_TURN
from lmserve.loading import reading
from lmserve.model.config import LARGEST
from lmserve.model.errors import CheckpointError
from lmserve.model.files import MAX_TEMPLATE, MAX_TOKENIZER, read_file, read_object, read_template

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TextSettings:
    """The text side of a checkpoint but for the tokenizer itself."""

    chat_template: str | None
    tool_template: str | None  # for requests with tools, where it is another one
    special_tokens: dict[str, str]
    eos_token_ids: list[int]


def text_settings(folder: Path, config: dict[str, Any]) -> TextSettings:
    """Chat template, special tokens and end tokens of a Hugging Face folder."""
    tokenizer_config = read_object(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(read_object(folder / "special_tokens_map.json"))
    special_tokens |= _special_tokens(tokenizer_config)
    eos: list[int] = []
    for source in (read_object(folder / "generation_config.json"), config):
        eos += _ids(source.get("eos_token_id"))
    added = added_tokens(folder)
    if "eos_token" in special_tokens and special_tokens["eos_token"] in added:
        eos.append(added[special_tokens["eos_token"]])
    templates = _chat_templates(folder, tokenizer_config)
    for path, template in templates.items():
        check_template(f"{folder}: chat template {path}", template)
    default, tools = templates.get("default"), templates.get("tool_use")
    # A model may end its turns with another token than its documents; the template writes it after each turn.
    eos += [token for text, token in added.items() if text in END_OF_TURN and text in (default or "")]
    eos = list(dict.fromkeys(eos))
    return TextSettings(
        default, tools, special_tokens, without_ends_of_messages(eos, added.keys(), added.get("<|end|>"))
    )


def check_template(where: str, template: str) -> None:
    """Raises CheckpointError for a chat template that is longer than any should be."""
    size = len(template.encode(errors="replace"))
    if size > MAX_TEMPLATE:
        raise CheckpointError(f"{where} must have at most {MAX_TEMPLATE} bytes, but has {size}")


def without_ends_of_messages(eos: list[int], tokens: Collection[str], end: int | None) -> list[int]:
    """The end tokens without <|end|>, `end`, where it ends only one of several messages of a turn (gpt-oss, Solar)."""
    harmony = {"<|return|>", "<|call|>"}.issubset(tokens) or {"<|calls|>", "<|flush|>"}.issubset(tokens)
    return [token for token in eos if token != end] if harmony else eos


def _special_tokens(source: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in SPECIAL_TOKENS:
        token = source.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[key] = text
    return found


def _ids(given: Any) -> list[int]:
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(token) is int and 0 <= token < LARGEST["vocab_size"] for token in ids):
        raise CheckpointError(f"eos_token_id must be a token id or a list of them, but {given!r} was given")
    return ids


class _AddedToken(Struct):
    id: int
    content: str


class _Added(Struct):
    """All that is read here of tokenizer.json: its millions of other values are skipped."""

    added_tokens: list[_AddedToken] | None = None


def added_tokens(folder: Path) -> dict[str, int]:
    """The ids of the tokens that tokenizer.json adds to its vocabulary, special ones among them."""
    path = folder / "tokenizer.json"
    with reading(str(path)):
        data = read_file(path, MAX_TOKENIZER)
        try:
            added = _Added() if data is None else msgspec.json.decode(data, type=_Added)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    return {token.content: token.id for token in added.added_tokens or ()}


def _chat_templates(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: "default", and "tool_use", the one for requests with tools; others are not read."""
    found: dict[str, Any] = {}
    given = tokenizer_config.get("chat_template", read_object(folder / "chat_template.json").get("chat_template"))
    if isinstance(given, str):
        found["default"] = given
    elif isinstance(given, dict):
        found |= given
    elif isinstance(given, list):
        found |= {entry.get("name"): entry.get("template") for entry in given}
    files = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
    for name, file in files.items():
        template = read_template(folder / file)
        if template is not None:
            found[name] = template
    return {name: template for name, template in found.items() if isinstance(template, str)}
