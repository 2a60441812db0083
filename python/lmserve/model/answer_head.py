"""Decoders that score a pair of texts by how likely "yes" is as an answer, against "no" (Qwen3-Reranker)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lmserve._core import Tokenizer
from lmserve.model.embedding import DenseLayer, Embedding, Frame
from lmserve.model.errors import CheckpointError
from lmserve.model.files import MAX_TOKENIZER, read_file, read_json, read_object
from lmserve.model.tensors import DerivedTensor, TensorSource

F32 = NDArray[np.float32]

MODULES: Final = "modules.json"
NAME: Final = "qwen3-reranker"
LABEL: Final = "yes"
# The words that Qwen3-Reranker was trained with.
FRAME: Final = Frame(
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct"
    ' provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web'
    " search query, retrieve relevant passages that answer the query\n<Query>: ",
    "\n<Document>:",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)


@dataclass(frozen=True, slots=True)
class RowDifference(DerivedTensor):
    """[1, width]: the first row of another tensor less the second, if it has one."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.source.shape[1])

    def dequantize(self) -> F32:
        rows = self.source.dequantize()
        difference: F32 = rows[:1] - rows[1:2] if len(rows) > 1 else rows
        return difference


def answers(weight: TensorSource, frame: Frame) -> Embedding:
    """What a model does whose head [2, hidden] gives the logits of "yes" and "no": its score is how likely "yes" is."""
    return Embedding(
        pooling="last", layers=(DenseLayer(RowDifference(weight)),), scores="sigmoid", labels=(LABEL,), frame=frame
    )


def answer_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The tokens of "yes" and "no", if the model in this folder scores by them; None for any other model.

    sentence-transformers' module LogitScore names them; the publisher's own folder says nothing, but is called so.
    """
    for module in read_json(folder / MODULES) or []:
        if str(module.get("type", "")).rpartition(".")[2] == "LogitScore":
            raw = read_object(folder / str(module.get("path", "")) / "config.json")
            if raw.get("false_token_id") is None:
                raise CheckpointError(f"{folder}: LogitScore without false_token_id is not supported")
            return int(raw["true_token_id"]), int(raw["false_token_id"])
    names = config.get("architectures")
    called = any(NAME in part.lower() for part in folder.resolve().parts[-4:])
    if not called or names != ["Qwen3ForCausalLM"] or (folder / MODULES).is_file():
        return None
    data = read_file(folder / "tokenizer.json", MAX_TOKENIZER)
    if data is None:
        raise CheckpointError(f"{folder} has no tokenizer.json, in which the tokens of yes and no are looked up")
    tokenizer = Tokenizer.from_json(data)
    found = [tokenizer.encode(word) for word in ("yes", "no")]
    if any(len(tokens) != 1 for tokens in found):
        raise CheckpointError(f"{folder}: yes and no are not one token each")
    return found[0][0], found[1][0]


def answer_head(tokens: tuple[int, int], stored: Mapping[str, TensorSource]) -> TensorSource:
    """The rows [2, hidden] of the head that are of these tokens."""
    names = ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight")
    head = next((stored[name] for name in names if name in stored), None)
    if head is None:
        raise CheckpointError("the head that gives the logits of yes and no is missing")
    if not all(0 <= token < head.shape[0] for token in tokens):
        raise CheckpointError(f"the tokens of yes and no, {tokens}, must lie in [0, {head.shape[0]})")
    return head.select_rows(np.array(tokens))
