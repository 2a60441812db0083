"""`POST /v1/score` and `/v1/rerank`: the scores of a model that scores pairs of texts, or the cosines of embeddings;
and `/v1/classify`: its labels.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import msgspec
import numpy as np
from litestar import Request, Response, post
from litestar.params import JSONBody
from msgspec import Struct
from numpy.typing import NDArray

from lmserve.api.convert.embedding import truncation
from lmserve.api.convert.vectors import Vectors, VectorsReply
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.reply import EngineReply
from lmserve.api.http.serving import model_of, serving_of, tenant_of
from lmserve.engine.submission import (
    DocumentInput,
    EmbedSubmission,
    FieldNames,
    FramedInput,
    PairInput,
    TextInput,
    Truncation,
)
from lmserve.errors import LmserveError
from lmserve.schemas.cohere import ApiVersion, BilledUnits, ReplyMeta, TokenCounts
from lmserve.schemas.embeddings import EmbeddingsUsage
from lmserve.schemas.scoring import (
    ClassifyReply,
    ClassifyRequest,
    LabelledText,
    RankedDocument,
    RerankReply,
    RerankRequest,
    RerankUsage,
    Score,
    ScoreReply,
    ScoreRequest,
    TextDocument,
)

Numbers = NDArray[np.float64]

# Documents of one search, as Cohere counts.
SEARCHED: Final = 100


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

    cut = truncation(data.truncate_prompt_tokens)
    return scored(request, model_of(data), (first, second), reply, ("text_1", "text_2"), cut=cut)


@post(
    ["/v1/rerank", "/v2/rerank"],
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
    version: Literal["1", "2"] = "2" if request.url.path.startswith("/v2/") else "1"
    return reranked(request, data, version)


def reranked(request: Request[Any, Any, Any], data: RerankRequest, version: Literal["1", "2"] = "1") -> EngineReply:
    """The reply to a request with its model. version: of Cohere's API."""
    documents = [item if isinstance(item, str) else item.text for item in data.documents]

    def reply(scores: list[float], usage: EmbeddingsUsage) -> RerankReply:
        order = by_score(scores)[: data.top_n]
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
            meta=ReplyMeta(
                api_version=ApiVersion(version),
                billed_units=BilledUnits(search_units=-(-len(documents) // SEARCHED)),
                tokens=TokenCounts(input_tokens=usage.prompt_tokens),
            ),
            results=results,
        )

    texts, cut = ([data.query], documents), truncation(data.truncate_prompt_tokens)
    fields, types, most = ("query", "documents"), ("query", "document"), data.max_tokens_per_doc
    return scored(request, model_of(data), texts, reply, fields, cut=cut, types=types, document_tokens=most)


@post(
    ["/v1/classify", "/classify"],
    dto=StrictJson[ClassifyRequest],
    return_dto=None,
    status_code=200,
    operation_id=_operation_id,
    summary="Label texts",
    description="vLLM's route: how likely each label of a model that classifies texts is.",
    tags=["Embeddings"],
    responses=responses(ClassifyReply, 400, 401, 404, 408, 413, 429, 503),
)
async def classify(data: JSONBody[ClassifyRequest], request: Request[Any, Any, Any]) -> Response[Any]:
    """Probabilities of the labels: by a softmax, or each by a sigmoid where several may hold or there is only one."""
    serving = serving_of(request)
    data = serving.with_model(data)
    embedding = serving.engine.embedding
    if embedding is None or embedding.scores is None:
        raise LmserveError.invalid("model", "this model gives no labels; one that classifies texts does")
    if embedding.frame is not None:
        raise LmserveError.invalid("model", "this model scores pairs of texts by an answer, and labels none")
    labels, several = embedding.labels, embedding.several_labels or embedding.length == 1

    def reply(vectors: Vectors, usage: EmbeddingsUsage) -> ClassifyReply:
        logits = vectors.astype(np.float64)
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = sigmoid(logits) if several else powers / powers.sum(-1, keepdims=True)
        return ClassifyReply(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=model_of(data),
            data=[
                LabelledText(index=index, label=labels[row.argmax()], probs=row.tolist(), num_classes=len(labels))
                for index, row in enumerate(probabilities)
            ],
            usage=usage,
        )

    texts = [data.input] if isinstance(data.input, str) else data.input
    submission = EmbedSubmission(
        model=model_of(data),
        inputs=[TextInput(text) for text in texts],
        encoding_format="base64",
        truncation=truncation(data.truncate_prompt_tokens),
        tenant=tenant_of(request),
    )
    return EngineReply(VectorsReply(serving.engine.embed(submission), reply))


def by_score(scores: Sequence[float]) -> list[int]:
    """Indices of the scores, the largest first."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def sigmoid(values: Numbers) -> Numbers:
    """1 / (1 + e^-x) of each number, also of those far from 0."""
    with np.errstate(over="ignore"):
        found: Numbers = 1 / (1 + np.exp(-values))
    return found


def cosines(first: Vectors, second: Vectors) -> list[float]:
    """Of vectors of length 1 [n, size]; `first` may be one vector, for all of `second`."""
    products: list[float] = np.clip((first * second).sum(-1), -1.0, 1.0).tolist()
    return products


def shown(logits: Vectors, function: str) -> list[float]:
    """The scores [n] of logits [n, 1], through a "sigmoid" or as they are ("identity")."""
    values: Numbers = logits[:, 0].astype(np.float64)
    scores: list[float] = (values if function == "identity" else sigmoid(values)).tolist()
    return scores


def scored(
    request: Request[Any, Any, Any],
    model: str,
    texts: tuple[Sequence[str], Sequence[str]],
    reply: Callable[[list[float], EmbeddingsUsage], Struct | list[Any]],
    fields: tuple[str, str],
    *,
    cut: Truncation | None,
    types: tuple[str, str] | None = None,
    function: str | None = None,
    document_tokens: int | None = None,
) -> EngineReply:
    """Of each second text with its first, or with the only first one. fields: those of the request with the texts.

    types: what the texts are, for prompts. function: what the scores of a model that scores pairs are shown through;
    None: what it says. document_tokens: what second texts are cut to.
    """
    engine = serving_of(request).engine
    first, second = texts
    embedding = engine.embedding
    inputs: list[TextInput | DocumentInput] | list[PairInput] | list[FramedInput]
    if embedding is not None and embedding.scores is not None:
        shown_through = function or embedding.scores
        if embedding.length != 1:
            message = f"this model gives {embedding.length} labels ({', '.join(embedding.labels[:8])}), not a score"
            raise LmserveError.invalid("model", message)
        firsts = first if len(first) == len(second) else [first[0]] * len(second)
        pairs, frame = list(zip(firsts, second, strict=True)), embedding.frame
        if frame is None:
            inputs = [PairInput(pair) for pair in pairs]
        else:
            inputs = [FramedInput(frame.around(query, document)) for query, document in pairs]

        def scores(vectors: Vectors) -> list[float]:
            return shown(vectors, shown_through)
    else:
        before = ("", "")
        if embedding is not None:
            usual = embedding.default_prefix
            before = (usual, usual) if types is None else (embedding.prompt_of(types[0]), embedding.prompt_of(types[1]))
        kind = TextInput if document_tokens is None else DocumentInput
        inputs = [*(TextInput(before[0] + text) for text in first), *(kind(before[1] + text) for text in second)]

        def scores(vectors: Vectors) -> list[float]:
            return cosines(vectors[: len(first)], vectors[len(first) :])

    # The texts of a pair are one input.
    count = 0 if isinstance(inputs[0], PairInput | FramedInput) else len(first)
    submission = EmbedSubmission(
        model=model,
        inputs=inputs,
        encoding_format="base64",
        truncation=cut,
        document_tokens=document_tokens,
        tenant=tenant_of(request),
        fields=FieldNames(input=fields[1], first=(fields[0], count)),
    )
    stream = engine.embed(submission)
    return EngineReply(VectorsReply(stream, lambda vectors, usage: reply(scores(vectors), usage)))
