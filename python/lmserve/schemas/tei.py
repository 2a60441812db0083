"""The routes `POST /embed` and `/rerank` as text-embeddings-inference (TEI) has them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from lmserve.schemas.bounds import RequestedModel, Tag, TokenId
from lmserve.schemas.embeddings import MAX_INPUT_TOKENS, MAX_INPUTS, NonEmptyText, Tokens, TruncateTokens
from lmserve.schemas.scoring import MAX_TEXTS, TextDocument, Texts

Direction = Annotated[
    Literal["Left", "Right", "left", "right"] | None,
    Meta(description="Which end `truncate` cuts off: `Left` the beginning; null: the end."),
]


class InputsRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts to embed, as TEI's clients send them. Null is the same as absent; an unknown key is an error."""

    model: RequestedModel = ""
    inputs: Annotated[
        NonEmptyText
        | Annotated[list[NonEmptyText | TokenId | Tokens], Meta(min_length=1, max_length=MAX_INPUT_TOKENS)],
        Meta(
            description=f"A text, a list of at most {MAX_INPUTS} texts, a list of token ids, or a list of such lists.",
            examples=["Hello world!"],
        ),
    ]
    truncate: Annotated[bool | None, Meta(description="Cut inputs that are too long; null: a 400.")] = None
    truncation_direction: Direction = None
    prompt_name: Annotated[
        Annotated[str, Meta(min_length=1, max_length=256)] | None,
        Meta(description="Put the model's prompt of this name before each text; null: the one that it says is usual."),
    ] = None
    dimensions: Annotated[
        Annotated[int, Meta(ge=1, le=65536)] | None,
        Meta(description="Keep the first dimensions and normalise again, if the model was trained for it; null: all."),
    ] = None
    normalize: Annotated[
        Literal[True] | None, Meta(description="Vectors have length 1 (L2), so that true has no effect.")
    ] = None


class AnyRerankRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Documents to put in order, as TEI's clients send them (`texts`), or Jina's and Cohere's (`documents`).

    Null is the same as absent; an unknown key is an error.
    """

    model: RequestedModel = ""
    query: Annotated[NonEmptyText, Meta(examples=["What has whiskers?"])]
    texts: Annotated[
        Texts | None,
        Meta(description=f"At most {MAX_TEXTS}; the reply is TEI's.", examples=[["A cat.", "A spanner."]]),
    ] = None
    raw_scores: Annotated[
        bool | None,
        Meta(
            description="With `texts`: scores as the model gives them; null: through a sigmoid. Cosines have none:"
            " no effect there."
        ),
    ] = None
    return_text: Annotated[bool | None, Meta(description="With `texts`: report them too; null: false.")] = None
    truncate: Annotated[bool | None, Meta(description="Cut inputs that are too long; null: a 400.")] = None
    truncation_direction: Direction = None
    documents: Annotated[
        Annotated[list[NonEmptyText | TextDocument], Meta(min_length=1, max_length=MAX_TEXTS)] | None,
        Meta(description=f"At most {MAX_TEXTS}; the reply is as that of `/v1/rerank`."),
    ] = None
    top_n: Annotated[
        Annotated[int, Meta(ge=1, le=2**31 - 1)] | None, Meta(description="Report only so many, the best; null: all.")
    ] = None
    return_documents: Annotated[bool | None, Meta(description="With `documents`: report them too; null: true.")] = None
    user: Annotated[Tag | None, Meta(description="Taken, and of no effect.")] = None
    truncate_prompt_tokens: TruncateTokens = None
    max_tokens_per_doc: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_INPUT_TOKENS)] | None,
        Meta(description="With `documents`: truncate each, with its prompt, to this many tokens. Null: none is."),
    ] = None


class RankedText(Struct, frozen=True, kw_only=True):
    """A text and its score; TEI's reply is a list of these, the best first."""

    index: Annotated[int, Meta(description="Its place in the request.")]
    text: str | UnsetType = UNSET
    score: float
