"""`POST /v1/embeddings`."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response, post
from litestar.params import JSONBody

from lmserve.api.convert.embedding import check_dimensions, check_embeds, prefix, truncation
from lmserve.api.convert.vectors import Vectors, VectorsReply, in_form
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.reply import EngineReply
from lmserve.api.http.serving import model_of, serving_of, tenant_of
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import EmbedSubmission, FieldNames, TextInput, TokensInput
from lmserve.errors import LmserveError
from lmserve.schemas.embeddings import MAX_INPUTS, Embedding, EmbeddingsReply, EmbeddingsRequest, EmbeddingsUsage


@post(
    "/v1/embeddings",
    dto=StrictJson[EmbeddingsRequest],
    return_dto=None,
    status_code=200,
    operation_id="create_embeddings",
    summary="Embed texts",
    description="OpenAI's embeddings. The vectors have the L2 norm 1 and are pooled from the model's last "
    "hidden states.",
    tags=["OpenAI"],
    responses=responses(EmbeddingsReply, 400, 401, 404, 408, 413, 429, 503),
)
async def embeddings(data: JSONBody[EmbeddingsRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """A vector for each input."""
    serving = serving_of(request)
    engine = serving.engine
    data = serving.with_model(data)
    stream = engine.embed(submission(engine, data, tenant=tenant_of(request)))
    form = data.encoding_format or "float"
    if form in ("float", "base64"):
        return EngineReply(stream)

    def reply(vectors: Vectors, usage: EmbeddingsUsage) -> EmbeddingsReply:
        rows = enumerate(in_form(vectors, form))
        return EmbeddingsReply(
            data=[Embedding(embedding=row, index=index) for index, row in rows], model=model_of(data), usage=usage
        )

    return EngineReply(VectorsReply(stream, reply))


def submission(
    engine: AsyncEngine, data: EmbeddingsRequest, *, tenant: int, fields: FieldNames | None = None
) -> EmbedSubmission:
    """The request as the core takes it. fields: what its route calls them.

    Raises LmserveError (400) for mixed or too many inputs, and for what the model does not have.
    """
    check_embeds(engine)
    names = fields or FieldNames()
    check_dimensions(engine, data.dimensions, names.dimensions)
    inputs = _inputs(data, names.input)
    before = prefix(engine, data)
    if before and isinstance(inputs[0], TokensInput):
        if data.prompt_name is not None or data.input_type is not None:
            name = "prompt_name" if data.prompt_name is not None else "input_type"
            raise LmserveError.invalid(name, f"{name} needs texts, but token ids were given")
    elif before:
        inputs = [TextInput(f"{before}{item.text}") for item in inputs if isinstance(item, TextInput)]
    return EmbedSubmission(
        model=model_of(data),
        inputs=inputs,
        truncation=truncation(data.truncate_prompt_tokens, data.truncate),
        encoding_format="float" if data.encoding_format in (None, "float") else "base64",
        dimensions=data.dimensions,
        centered=engine.embedding is not None and engine.embedding.centered,
        tenant=tenant,
        fields=fields,
    )


def _inputs(data: EmbeddingsRequest, field: str) -> list[TextInput] | list[TokensInput]:
    if isinstance(data.input, str):
        return [TextInput(data.input)]
    if all(isinstance(item, int) for item in data.input):
        return [TokensInput([item for item in data.input if isinstance(item, int)])]
    if len(data.input) > MAX_INPUTS:
        message = f"{field} may have at most {MAX_INPUTS} entries, but {len(data.input)} were given"
        raise LmserveError.invalid(field, message)
    texts = [TextInput(item) for item in data.input if isinstance(item, str)]
    tokens = [TokensInput(item) for item in data.input if isinstance(item, list)]
    for inputs in (texts, tokens):
        if len(inputs) == len(data.input):
            return inputs
    message = (
        f"{field} must be a text, a list of texts, a list of token ids, or a list of such lists, but a "
        "mixed list was given"
    )
    raise LmserveError.invalid(field, message)
