"""`POST /v1/score` in vLLM's shape, `POST /v1/rerank` in Jina's and Cohere's."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import RequestedModel, Tag
from lmserve.schemas.embeddings import EmbeddingsUsage, NonEmptyText, TruncateTokens

MAX_TEXTS: Final = 1024

Texts = Annotated[list[NonEmptyText], Meta(min_length=1, max_length=MAX_TEXTS)]


class ScoreRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts to compare. An unknown key is an error."""

    model: RequestedModel = ""
    text_1: Annotated[
        NonEmptyText | Texts,
        Meta(description="A text, which is compared with each of text_2; or as many as those.", examples=["A cat."]),
    ]
    text_2: Annotated[
        NonEmptyText | Texts,
        Meta(description=f"A text, or at most {MAX_TEXTS}.", examples=[["A kitten.", "A spanner."]]),
    ]
    user: Annotated[Tag | None, Meta(description="Taken, and of no effect.")] = None
    truncate_prompt_tokens: TruncateTokens = None


class Score(Struct, frozen=True, kw_only=True):
    """How alike the texts of a pair are: the score of a model that scores pairs, or the cosine of embeddings."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreReply(Struct, frozen=True, kw_only=True):
    """A score for each pair, in their order; `created` is in seconds since 1970."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: EmbeddingsUsage


class TextDocument(Struct, frozen=True):
    """A document that may have further keys, which are ignored."""

    text: NonEmptyText


class RerankRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Documents to put in order. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    query: Annotated[NonEmptyText, Meta(examples=["What has whiskers?"])]
    documents: Annotated[
        Annotated[list[NonEmptyText | TextDocument], Meta(min_length=1, max_length=MAX_TEXTS)],
        Meta(description=f"At most {MAX_TEXTS}.", examples=[["A cat.", "A spanner."]]),
    ]
    top_n: Annotated[
        Annotated[int, Meta(ge=1, le=2**31 - 1)] | None, Meta(description="Report only so many, the best; null: all.")
    ] = None
    return_documents: Annotated[bool | None, Meta(description="Report the documents too; null: true.")] = None
    user: Annotated[Tag | None, Meta(description="Taken, and of no effect.")] = None
    truncate_prompt_tokens: TruncateTokens = None
    max_tokens_per_doc: Annotated[Any, Meta(description="Not supported: a 400, unless null.")] = None


class RankedDocument(Struct, frozen=True, kw_only=True):
    """A document and how relevant it is: the score of a model that scores pairs, or the cosine of two embeddings."""

    index: Annotated[int, Meta(description="Its place in the request.")]
    document: TextDocument | UnsetType = UNSET
    relevance_score: float


class RerankUsage(Struct, frozen=True):
    """Tokens of the query and of all documents."""

    total_tokens: int
    prompt_tokens: int


class RerankReply(Struct, frozen=True, kw_only=True):
    """Documents, the most relevant first."""

    id: str
    model: str
    usage: RerankUsage
    results: list[RankedDocument]
