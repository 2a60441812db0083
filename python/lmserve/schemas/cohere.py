"""Cohere's `POST /v2/embed`, and what its replies say beside the results."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import RequestedModel
from lmserve.schemas.embeddings import MAX_INPUT_TOKENS, MAX_INPUTS, NonEmptyText, VectorForm


class ApiVersion(Struct, frozen=True):
    """Of Cohere's API."""

    version: Literal["1", "2"] = "2"


class BilledUnits(Struct, frozen=True, kw_only=True):
    """Tokens of texts, or searches: a query with up to 100 documents is one."""

    input_tokens: int | UnsetType = UNSET
    search_units: int | UnsetType = UNSET


class TokenCounts(Struct, frozen=True, kw_only=True):
    """Tokens of the request and of the answer."""

    input_tokens: int
    output_tokens: int = 0


class ReplyMeta(Struct, frozen=True, kw_only=True):
    """What Cohere's replies say beside the results."""

    api_version: ApiVersion = ApiVersion()
    billed_units: BilledUnits
    tokens: TokenCounts


class EmbedRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts to embed, as Cohere's clients send them. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    texts: Annotated[
        list[NonEmptyText],
        Meta(min_length=1, max_length=MAX_INPUTS, description=f"At most {MAX_INPUTS}.", examples=[["Hello world!"]]),
    ]
    input_type: Annotated[
        Annotated[str, Meta(min_length=1, max_length=256)] | None,
        Meta(
            description="`search_query`, `search_document` and so on: put the model's prompt for them before each text,"
            " if it has one."
        ),
    ] = None
    embedding_types: Annotated[
        Annotated[list[VectorForm], Meta(min_length=1, max_length=6)] | None,
        Meta(description="The forms of each vector that the reply has; null: float. See `/v1/embeddings`."),
    ] = None
    output_dimension: Annotated[
        Annotated[int, Meta(ge=1, le=65536)] | None,
        Meta(description="Keep the first dimensions and normalise again, if the model was trained for it; null: all."),
    ] = None
    max_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_INPUT_TOKENS)] | None,
        Meta(description="Cut texts to so many tokens; null: to what the model takes, where `truncate` says so."),
    ] = None
    truncate: Annotated[
        Literal["NONE", "START", "END"] | None,
        Meta(description="Cut texts that are too long, at their start or their end; null: a 400, as NONE."),
    ] = None


class EmbeddingsByType(Struct, frozen=True, kw_only=True, rename={"float_": "float"}):
    """The vectors in each form that was asked for, in the order of the texts."""

    float_: list[list[float]] | UnsetType = UNSET
    base64: list[str] | UnsetType = UNSET
    int8: list[list[int]] | UnsetType = UNSET
    uint8: list[list[int]] | UnsetType = UNSET
    binary: list[list[int]] | UnsetType = UNSET
    ubinary: list[list[int]] | UnsetType = UNSET


class EmbedReply(Struct, frozen=True, kw_only=True):
    """Vectors of length 1 (L2), in some forms."""

    id: str
    embeddings: EmbeddingsByType
    texts: list[str]
    meta: ReplyMeta
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"
