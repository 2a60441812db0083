"""Tokenizers whose files say elsewhere than in tokenizer.json that they write texts in lower case."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from lmserve.model.errors import CheckpointError
from lmserve.model.files import read_object

BERT: Final = "BertNormalizer"


def with_case(data: bytes, folder: Path) -> bytes:
    """tokenizer.json, `data`, with what `do_lower_case` says in the files beside it.

    That of tokenizer_config.json is what transformers builds BERT's normalizer with; that of sentence_bert_config.json
    comes before the tokenizer. Raises CheckpointError for a malformed file.
    """
    wanted = read_object(folder / "tokenizer_config.json").get("do_lower_case")
    before = read_object(folder / "sentence_bert_config.json").get("do_lower_case") is True
    if not before and not isinstance(wanted, bool):
        return data
    try:
        tokenizer = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    if not isinstance(tokenizer, dict):
        raise CheckpointError(f"{folder / 'tokenizer.json'} is not a tokenizer: it holds no object")
    normalizer = tokenizer.get("normalizer")
    found = normalizer
    if isinstance(normalizer, dict) and normalizer.get("type") == BERT and isinstance(wanted, bool):
        found = normalizer | {"lowercase": wanted or before}
    elif before:
        found = _after_lower_case(normalizer)
    return data if found == normalizer else msgspec.json.encode(tokenizer | {"normalizer": found})


def _after_lower_case(normalizer: Any) -> dict[str, Any]:
    lower = {"type": "Lowercase"}
    return lower if normalizer is None else {"type": "Sequence", "normalizers": [lower, normalizer]}
