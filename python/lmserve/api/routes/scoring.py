"""`POST /v1/score` and `/v1/rerank`: the scores of a model that scores pairs of texts, or the cosines of embeddings."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from litestar import Request, Response, post
from litestar.params import JSONBody
from msgspec import Struct
from numpy.typing import NDArray

from lmserve.api.convert.embedding import truncation
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.reply import EngineReply, rewritten
from lmserve.api.http.serving import model_of, serving_of, tenant_of
from lmserve.engine.async_engine import AsyncStream
from lmserve.engine.submission import EmbedSubmission, PairInput, TextInput
from lmserve.errors import LmserveError
from lmserve.schemas.embeddings import EmbeddingsReply, EmbeddingsUsage
from lmserve.schemas.scoring import (
    RankedDocument,
    RerankReply,
    RerankRequest,
    RerankUsage,
    Score,
    ScoreReply,
    ScoreRequest,
    TextDocument,
)

Vectors = NDArray[np.float32]


def _operation_id(_handler: object, _method: object, path: Sequence[object]) -> str:
    """Each path is an operation of its own: score, rerank, v1_rerank."""
    return "_".join(map(str, path))


@post(
    ["/v1/score", "/score"],
    dto=StrictJson[ScoreRequest],
    return_dto=None,
    status_code=200,
    operation_id=_operation_id,
    summary="Compare pairs of texts",
    description="vLLM's route. A pair's score is the output of a model that scores pairs, or the cosine of two "
    "embeddings.",
    tags=["Embeddings"],
    responses=responses(ScoreReply, 400, 401, 404, 408, 413, 429, 503),
)
async def score(data: JSONBody[ScoreRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """One text against several, or pair by pair."""
    data = serving_of(request).with_model(data)
    first = [data.text_1] if isinstance(data.text_1, str) else data.text_1
    second = [data.text_2] if isinstance(data.text_2, str) else data.text_2
    if len(first) not in (1, len(second)):
        message = f"text_1 must be one text or as many as text_2, but {len(first)} and {len(second)} texts were given"
        raise LmserveError.invalid("text_1", message)

    def reply(scores: list[float], usage: EmbeddingsUsage) -> ScoreReply:
        return ScoreReply(
            id=f"score-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=model_of(data),
            data=[Score(index=index, score=value) for index, value in enumerate(scores)],
            usage=usage,
        )

    return _scored(request, model_of(data), (first, second), reply, tokens=data.truncate_prompt_tokens)


@post(
    ["/v1/rerank", "/rerank", "/v2/rerank"],
    dto=StrictJson[RerankRequest],
    return_dto=None,
    status_code=200,
    operation_id=_operation_id,
    summary="Rank documents by relevance",
    description="Jina's and Cohere's route. Ranks by the scores of a model that scores pairs, or by the "
    "cosines of embeddings.",
    tags=["Embeddings"],
    responses=responses(RerankReply, 400, 401, 404, 408, 413, 429, 503),
)
async def rerank(data: JSONBody[RerankRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """The documents, the most relevant first."""
    data = serving_of(request).with_model(data)
    if data.max_tokens_per_doc is not None:
        message = "max_tokens_per_doc is not supported: the server never truncates documents; leave it out"
        raise LmserveError.invalid("max_tokens_per_doc", message, "unsupported_parameter")
    documents = [item if isinstance(item, str) else item.text for item in data.documents]

    def reply(scores: list[float], usage: EmbeddingsUsage) -> RerankReply:
        order = sorted(range(len(documents)), key=lambda index: -scores[index])[: data.top_n]
        results = [
            RankedDocument(
                index=index,
                document=msgspec.UNSET if data.return_documents is False else TextDocument(documents[index]),
                relevance_score=scores[index],
            )
            for index in order
        ]
        return RerankReply(
            id=f"rerank-{uuid.uuid4().hex}",
            model=model_of(data),
            usage=RerankUsage(total_tokens=usage.total_tokens, prompt_tokens=usage.prompt_tokens),
            results=results,
        )

    texts, tokens = ([data.query], documents), data.truncate_prompt_tokens
    return _scored(request, model_of(data), texts, reply, tokens=tokens, types=("query", "document"))


def cosines(first: Vectors, second: Vectors) -> list[float]:
    """Of vectors of length 1 [n, size]; `first` may be one vector, for all of `second`."""
    products: list[float] = np.clip((first * second).sum(-1), -1.0, 1.0).tolist()
    return products


def shown(logits: Vectors, function: str) -> list[float]:
    """The scores [n] of logits [n, 1], through a "sigmoid" or as they are ("identity")."""
    values = logits[:, 0].astype(np.float64)
    scores: list[float] = (values if function == "identity" else 1 / (1 + np.exp(-values))).tolist()
    return scores


class _ScoredReply:
    """A reply that is made of the core's vectors."""

    def __init__(
        self,
        stream: AsyncStream,
        scores: Callable[[Vectors], list[float]],
        reply: Callable[[list[float], EmbeddingsUsage], Struct],
    ) -> None:
        self._stream = stream
        self._scores = scores
        self._reply = reply

    async def body(self) -> bytes:
        body = await self._stream.body()
        return await rewritten([body], lambda: self._scored(body))

    def _scored(self, body: bytes) -> bytes:
        embeddings = msgspec.json.decode(body, type=EmbeddingsReply)
        rows = [base64.b64decode(str(item.embedding)) for item in embeddings.data]
        vectors = np.frombuffer(b"".join(rows), "<f4").reshape(len(rows), -1)
        return msgspec.json.encode(self._reply(self._scores(vectors), embeddings.usage))

    def abort(self) -> None:
        self._stream.abort()


def _scored(
    request: Request[Any, Any, Any],
    model: str,
    texts: tuple[Sequence[str], Sequence[str]],
    reply: Callable[[list[float], EmbeddingsUsage], Struct],
    *,
    tokens: int | None,
    types: tuple[str, str] | None = None,
) -> EngineReply:
    """Of each second text with its first, or with the only first one. types: what the texts are, for prompts."""
    engine = serving_of(request).engine
    first, second = texts
    embedding = engine.embedding
    inputs: list[TextInput] | list[PairInput]
    if embedding is not None and embedding.scores is not None:
        function = embedding.scores
        if embedding.length != 1:
            message = f"this model gives {embedding.length} labels ({', '.join(embedding.labels[:8])}), not a score"
            raise LmserveError.invalid("model", message)
        firsts = first if len(first) == len(second) else [first[0]] * len(second)
        inputs = [PairInput(pair) for pair in zip(firsts, second, strict=True)]

        def scores(vectors: Vectors) -> list[float]:
            return shown(vectors, function)
    else:
        before = ("", "")
        if embedding is not None:
            usual = embedding.default_prefix
            before = (usual, usual) if types is None else (embedding.prompt_of(types[0]), embedding.prompt_of(types[1]))
        inputs = [TextInput(prompt + text) for prompt, part in zip(before, texts, strict=True) for text in part]

        def scores(vectors: Vectors) -> list[float]:
            return cosines(vectors[: len(first)], vectors[len(first) :])

    submission = EmbedSubmission(
        model=model, inputs=inputs, encoding_format="base64", truncation=truncation(tokens), tenant=tenant_of(request)
    )
    return EngineReply(_ScoredReply(engine.embed(submission), scores, reply))
