"""The parts of embedding and scoring requests that depend on the model: prompts, lengths of vectors, and scores."""

from __future__ import annotations

from typing import Literal

from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import Truncation
from lmserve.errors import LmserveError
from lmserve.schemas.embeddings import EmbeddingsRequest


def check_embeds(engine: AsyncEngine) -> None:
    """Raises LmserveError (400) for a model that makes scores of texts, and no embeddings."""
    if engine.embedding is not None and engine.embedding.scores is not None:
        message = "this model scores pairs of texts and cannot compute embeddings; use /v1/score or /v1/rerank"
        raise LmserveError.invalid("model", message)


def check_dimensions(engine: AsyncEngine, dimensions: int | None, field: str) -> None:
    """Raises LmserveError (400) where the model's vectors must not be cut to this length. field: what asks for it."""
    embedding = engine.embedding
    if embedding is None or dimensions is None or embedding.allows(dimensions):
        return
    if embedding.dimensions == (0,):
        allowed = f"lie in [1, {embedding.length}]"
    else:
        lengths = ", ".join(map(str, sorted({*embedding.dimensions, embedding.length})))
        allowed = f"be {lengths}: the model was not trained for others (matryoshka_dimensions of its config.json)"
    raise LmserveError.invalid(field, f"{field} must {allowed}, but {dimensions} was given")


def prefix(engine: AsyncEngine, data: EmbeddingsRequest) -> str:
    """What stands before each text. Raises LmserveError (400) for a prompt that the model does not have."""
    embedding = engine.embedding
    if data.prompt_name is not None and data.input_type is not None:
        raise LmserveError.invalid(
            "prompt_name", "prompt_name and input_type cannot be combined; leave one of them out"
        )
    if data.prompt_name is None and data.input_type is None:
        return "" if embedding is None else embedding.default_prefix
    if data.input_type is not None:
        return "" if embedding is None else embedding.prompt_of(data.input_type)
    prompts = {} if embedding is None else embedding.prompts
    found = prompts.get(data.prompt_name or "")
    if found is None:
        names = ", ".join(prompts) or "it has none"
        message = f"prompt_name must be one of the model's prompts ({names}), but {data.prompt_name!r} was given"
        raise LmserveError.invalid("prompt_name", message)
    return found


def truncation(tokens: int | None, truncate: bool | str | None = None) -> Truncation | None:
    """How inputs are cut that are longer than `tokens` (-1, None: than the model takes); None: they are not.

    truncate: "START" and "END" say which end is cut, and True is "END"; False and "NONE" are as None.
    """
    cut: Literal["start", "end"] = "start" if truncate == "START" else "end"
    if tokens is not None:
        return Truncation(None if tokens == -1 else tokens, cut)
    return Truncation(None, cut) if truncate in (True, "START", "END") else None
