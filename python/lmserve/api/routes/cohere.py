"""`POST /v2/embed`, as Cohere's clients send it."""

from __future__ import annotations

import uuid
from typing import Any, Final

from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.convert.vectors import Vectors, VectorsReply, in_form
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.reply import EngineReply
from lmserve.api.http.serving import serving_of, tenant_of
from lmserve.api.routes.embeddings import submission
from lmserve.engine.submission import FieldNames
from lmserve.schemas.cohere import BilledUnits, EmbeddingsByType, EmbedReply, EmbedRequest, ReplyMeta, TokenCounts
from lmserve.schemas.embeddings import EmbeddingsRequest, EmbeddingsUsage

# What Cohere calls fields of /v1/embeddings.
FIELDS: Final = FieldNames(input="texts", dimensions="output_dimension", truncation="max_tokens")


@post(
    "/v2/embed",
    dto=StrictJson[EmbedRequest],
    return_dto=None,
    status_code=200,
    operation_id="v2_embed",
    summary="Embed texts, as Cohere does",
    description="Cohere's route: vectors of length 1 (L2), in each form that `embedding_types` names.",
    tags=["Embeddings"],
    responses=responses(EmbedReply, 400, 401, 404, 408, 413, 429, 503),
)
async def embed_by_type(data: JSONBody[EmbedRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """Each vector in some forms."""
    serving = serving_of(request)
    data = serving.with_model(data)
    asked = EmbeddingsRequest(
        model=data.model,
        input=list(data.texts),
        encoding_format="base64",
        dimensions=data.output_dimension,
        input_type=data.input_type,
        truncate_prompt_tokens=data.max_tokens,
        truncate=data.truncate,
    )

    def reply(vectors: Vectors, usage: EmbeddingsUsage) -> EmbedReply:
        forms = data.embedding_types or ["float"]
        fields = {f"{form}_" if form == "float" else form: in_form(vectors, form) for form in forms}
        return EmbedReply(
            id=f"embed-{uuid.uuid4().hex}",
            embeddings=EmbeddingsByType(**fields),
            texts=data.texts,
            meta=ReplyMeta(
                billed_units=BilledUnits(input_tokens=usage.prompt_tokens),
                tokens=TokenCounts(input_tokens=usage.prompt_tokens),
            ),
        )

    engine = serving.engine
    stream = engine.embed(submission(engine, asked, tenant=tenant_of(request), fields=FIELDS))
    return EngineReply(VectorsReply(stream, reply))
