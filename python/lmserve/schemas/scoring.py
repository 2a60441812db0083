"""`POST /v1/score` and `/v1/classify` in vLLM's shape, `POST /v1/rerank` in Jina's and Cohere's."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import RequestedModel, Tag
from lmserve.schemas.cohere import ReplyMeta
from lmserve.schemas.embeddings import MAX_INPUT_TOKENS, EmbeddingsUsage, NonEmptyText, TruncateTokens

MAX_TEXTS: Final = 1024

Texts = Annotated[list[NonEmptyText], Meta(min_length=1, max_length=MAX_TEXTS)]


class ScoreRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts to compare. An unknown key is an error."""

    model: RequestedModel = ""
    text_1: Annotated[
        NonEmptyText | Texts,
        Meta(
            description="A text that is compared with each text of text_2, or a list of as many texts as text_2 has.",
            examples=["A cat."],
        ),
    ]
    text_2: Annotated[
        NonEmptyText | Texts,
        Meta(description=f"A text, or at most {MAX_TEXTS}.", examples=[["A kitten.", "A spanner."]]),
    ]
    user: Annotated[Tag | None, Meta(description="Accepted, but has no effect.")] = None
    truncate_prompt_tokens: TruncateTokens = None


class Score(Struct, frozen=True, kw_only=True):
    """How similar the texts of a pair are: the score of a model that scores pairs, or the cosine of two embeddings."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreReply(Struct, frozen=True, kw_only=True):
    """A score for each pair, in the order of the pairs; `created` is in seconds since 1970."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: EmbeddingsUsage


class TextDocument(Struct, frozen=True):
    """A document. Further keys are ignored."""

    text: NonEmptyText


class RerankRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Documents to rank. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    query: Annotated[NonEmptyText, Meta(examples=["What has whiskers?"])]
    documents: Annotated[
        Annotated[list[NonEmptyText | TextDocument], Meta(min_length=1, max_length=MAX_TEXTS)],
        Meta(description=f"At most {MAX_TEXTS} documents.", examples=[["A cat.", "A spanner."]]),
    ]
    top_n: Annotated[
        Annotated[int, Meta(ge=1, le=2**31 - 1)] | None,
        Meta(description="Report only this many documents, the most relevant ones. Null: all."),
    ] = None
    return_documents: Annotated[bool | None, Meta(description="Report the documents as well. Null: true.")] = None
    user: Annotated[Tag | None, Meta(description="Accepted, but has no effect.")] = None
    truncate_prompt_tokens: TruncateTokens = None
    max_tokens_per_doc: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_INPUT_TOKENS)] | None,
        Meta(description="Truncate each document, with its prompt, to this many tokens. Null: none is."),
    ] = None


class RankedDocument(Struct, frozen=True, kw_only=True):
    """A document and its relevance: the score of a model that scores pairs, or the cosine of two embeddings."""

    index: Annotated[int, Meta(description="The document's index in the request.")]
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
    meta: ReplyMeta
    results: list[RankedDocument]


class ClassifyRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts to label. An unknown key is an error."""

    model: RequestedModel = ""
    input: Annotated[
        NonEmptyText | Texts, Meta(description=f"A text, or at most {MAX_TEXTS}.", examples=["What a fine day!"])
    ]
    user: Annotated[Tag | None, Meta(description="Taken, and of no effect.")] = None
    truncate_prompt_tokens: TruncateTokens = None


class LabelledText(Struct, frozen=True, kw_only=True):
    """The label that is most likely, and how likely each is, in the model's order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyReply(Struct, frozen=True, kw_only=True):
    """Labels in the order of the texts; `created` is in seconds since 1970."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[LabelledText]
    usage: EmbeddingsUsage
