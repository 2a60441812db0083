"""`POST /v1/score` and `/v1/rerank`: how alike texts are, by the cosine of their embeddings."""

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

from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.reply import EngineReply, rewritten
from lmserve.api.http.serving import model_of, serving_of, tenant_of
from lmserve.engine.async_engine import AsyncStream
from lmserve.engine.submission import EmbedSubmission, TextInput
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
    description="vLLM's route: the cosine of the two embeddings of each pair.",
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

    def reply(vectors: Vectors, usage: EmbeddingsUsage) -> ScoreReply:
        scores = cosines(vectors[: len(first)], vectors[len(first) :])
        return ScoreReply(
            id=f"score-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=model_of(data),
            data=[Score(index=index, score=value) for index, value in enumerate(scores)],
            usage=usage,
        )

    return _embedded(request, model_of(data), [*first, *second], reply)


@post(
    ["/v1/rerank", "/rerank", "/v2/rerank"],
    dto=StrictJson[RerankRequest],
    return_dto=None,
    status_code=200,
    operation_id=_operation_id,
    summary="Put documents in order of relevance",
    description="Jina's and Cohere's route: by the cosine of each document's embedding and the query's.",
    tags=["Embeddings"],
    responses=responses(RerankReply, 400, 401, 404, 408, 413, 429, 503),
)
async def rerank(data: JSONBody[RerankRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """The documents, the most relevant first."""
    data = serving_of(request).with_model(data)
    if data.max_tokens_per_doc is not None:
        message = "max_tokens_per_doc is not supported: documents are never cut; leave it out"
        raise LmserveError.invalid("max_tokens_per_doc", message, "unsupported_parameter")
    documents = [item if isinstance(item, str) else item.text for item in data.documents]

    def reply(vectors: Vectors, usage: EmbeddingsUsage) -> RerankReply:
        scores = cosines(vectors[:1], vectors[1:])
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

    return _embedded(request, model_of(data), [data.query, *documents], reply)


def cosines(first: Vectors, second: Vectors) -> list[float]:
    """Of vectors of length 1 [n, size]; `first` may be one vector, for all of `second`."""
    products: list[float] = np.clip((first * second).sum(-1), -1.0, 1.0).tolist()
    return products


class _EmbeddedReply:
    """A reply that is made of the core's embeddings."""

    def __init__(self, stream: AsyncStream, reply: Callable[[Vectors, EmbeddingsUsage], Struct]) -> None:
        self._stream = stream
        self._reply = reply

    async def body(self) -> bytes:
        body = await self._stream.body()
        return await rewritten([body], lambda: self._scored(body))

    def _scored(self, body: bytes) -> bytes:
        embeddings = msgspec.json.decode(body, type=EmbeddingsReply)
        rows = [base64.b64decode(str(item.embedding)) for item in embeddings.data]
        vectors = np.frombuffer(b"".join(rows), "<f4").reshape(len(rows), -1)
        return msgspec.json.encode(self._reply(vectors, embeddings.usage))

    def abort(self) -> None:
        self._stream.abort()


def _embedded(
    request: Request[Any, Any, Any],
    model: str,
    texts: Sequence[str],
    reply: Callable[[Vectors, EmbeddingsUsage], Struct],
) -> EngineReply:
    engine = serving_of(request).engine
    submission = EmbedSubmission(
        model=model,
        inputs=[TextInput(text) for text in texts],
        encoding_format="base64",
        tenant=tenant_of(request),
    )
    return EngineReply(_EmbeddedReply(engine.embed(submission), reply))
