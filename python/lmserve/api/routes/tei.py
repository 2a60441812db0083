"""`POST /embed` and `/rerank` of text-embeddings-inference (TEI)."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.convert.embedding import truncation
from lmserve.api.convert.vectors import Vectors, VectorsReply, in_form
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.reply import EngineReply
from lmserve.api.http.serving import model_of, serving_of, tenant_of
from lmserve.api.routes.embeddings import submission
from lmserve.api.routes.scoring import by_score, reranked, scored
from lmserve.engine.submission import FieldNames
from lmserve.errors import LmserveError
from lmserve.schemas.embeddings import EmbeddingsRequest, EmbeddingsUsage
from lmserve.schemas.scoring import RerankReply, RerankRequest
from lmserve.schemas.tei import AnyRerankRequest, InputsRequest, RankedText

# What TEI calls a field of /v1/embeddings.
FIELDS: Final = FieldNames(input="inputs")


@post(
    "/embed",
    dto=StrictJson[InputsRequest],
    return_dto=None,
    status_code=200,
    operation_id="embed",
    summary="Embed texts, as text-embeddings-inference does",
    description="TEI's route: a list of vectors of length 1 (L2), in the order of the inputs.",
    tags=["Embeddings"],
    responses=responses(list[list[float]], 400, 401, 404, 408, 413, 429, 503),
)
async def embed(data: JSONBody[InputsRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """A vector for each input."""
    serving = serving_of(request)
    data = serving.with_model(data)
    asked = EmbeddingsRequest(
        model=data.model,
        input=data.inputs if isinstance(data.inputs, str) else list(data.inputs),
        encoding_format="base64",
        dimensions=data.dimensions,
        prompt_name=data.prompt_name,
        truncate=_cut(data),
    )

    def reply(vectors: Vectors, usage: EmbeddingsUsage) -> list[Any]:
        del usage
        return in_form(vectors, "float")

    engine = serving.engine
    stream = engine.embed(submission(engine, asked, tenant=tenant_of(request), fields=FIELDS))
    return EngineReply(VectorsReply(stream, reply))


@post(
    "/rerank",
    dto=StrictJson[AnyRerankRequest],
    return_dto=None,
    status_code=200,
    operation_id="rerank",
    summary="Put texts in order of relevance",
    description="TEI's route where `texts` are given, whose reply is a list; with `documents` as `/v1/rerank`.",
    tags=["Embeddings"],
    responses=responses(RerankReply | list[RankedText], 400, 401, 404, 408, 413, 429, 503),
)
async def rerank_texts(data: JSONBody[AnyRerankRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """The texts or documents, the most relevant first."""
    data = serving_of(request).with_model(data)
    cut = truncation(data.truncate_prompt_tokens, _cut(data))
    if data.texts is None:
        return _of_documents(request, data)
    for name in ("documents", "top_n", "return_documents", "max_tokens_per_doc"):
        if getattr(data, name) is not None:
            raise LmserveError.invalid(name, f"{name} does not go with texts; leave one of them out")
    texts = data.texts

    def reply(scores: list[float], usage: EmbeddingsUsage) -> list[RankedText]:
        del usage
        return [
            RankedText(index=index, text=texts[index] if data.return_text else msgspec.UNSET, score=scores[index])
            for index in by_score(scores)
        ]

    function = "identity" if data.raw_scores else "sigmoid"
    both, types, fields = ([data.query], texts), ("query", "document"), ("query", "texts")
    return scored(request, model_of(data), both, reply, fields, cut=cut, types=types, function=function)


def _of_documents(request: Request[Any, Any, Any], data: AnyRerankRequest) -> EngineReply:
    if data.documents is None:
        raise LmserveError.invalid("texts", "texts (or documents) must be given, but neither was")
    for name in ("raw_scores", "return_text", "truncate", "truncation_direction"):
        if getattr(data, name) is not None:
            raise LmserveError.invalid(name, f"{name} goes with texts, but documents were given")
    asked = RerankRequest(
        model=data.model,
        query=data.query,
        documents=data.documents,
        top_n=data.top_n,
        return_documents=data.return_documents,
        truncate_prompt_tokens=data.truncate_prompt_tokens,
        max_tokens_per_doc=data.max_tokens_per_doc,
    )
    return reranked(request, asked)


def _cut(data: InputsRequest | AnyRerankRequest) -> Literal["START", "END"] | None:
    if not data.truncate:
        return None
    return "START" if (data.truncation_direction or "").lower() == "left" else "END"
