"""`POST /v1/embeddings`: OpenAI's embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from lmserve.schemas.bounds import RequestedModel, Tag, TokenId

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 1_048_576

NonEmptyText = Annotated[str, Meta(min_length=1, max_length=8_388_608)]
Tokens = Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_INPUT_TOKENS)]

TruncateTokens = Annotated[
    Annotated[int, Meta(ge=-1, le=MAX_INPUT_TOKENS)] | None,
    Meta(
        description="Truncate inputs to this many tokens. -1: to the model's limit. Null: an input that is too "
        "long is a 400."
    ),
]

# float, or little-endian 32-bit floats in base64, or each number in 8 bits, or the sign of each in one bit.
VectorForm = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]


class EmbeddingsRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts to embed. An unknown key is an error."""

    model: RequestedModel = ""
    input: Annotated[
        NonEmptyText
        | Annotated[list[NonEmptyText | TokenId | Tokens], Meta(min_length=1, max_length=MAX_INPUT_TOKENS)],
        Meta(
            description=f"A text, a list of at most {MAX_INPUTS} texts, a list of token ids, or a list of such lists.",
            examples=["Hello world!"],
        ),
    ]
    encoding_format: Annotated[
        VectorForm | None,
        Meta(
            description="base64: little-endian 32-bit floats; int8, uint8: each number in 8 bits, the largest of a"
            " vector as 127 (of uint8 128 more); binary, ubinary: the signs, 8 in an int8 or uint8, as Cohere's."
        ),
    ] = None
    dimensions: Annotated[
        Annotated[int, Meta(ge=1, le=65536)] | None,
        Meta(
            description="Keep this many of the first dimensions and normalise again. The model must be trained for it "
            "(Matryoshka). Null: all."
        ),
    ] = None
    prompt_name: Annotated[
        Annotated[str, Meta(min_length=1, max_length=256)] | None,
        Meta(description="Put the model's prompt of this name before each text. Null: the model's default prompt."),
    ] = None
    input_type: Annotated[
        Annotated[str, Meta(min_length=1, max_length=256)] | None,
        Meta(
            description="`query` or `document`, or another server's name for these: put the model's prompt for this "
            "type before each text, if it has one."
        ),
    ] = None
    truncate_prompt_tokens: TruncateTokens = None
    truncate: Annotated[
        bool | Literal["NONE", "START", "END"] | None,
        Meta(
            description="Truncate inputs that are too long: at their end (true or END) or at their start (START). "
            "Null: such an input is a 400."
        ),
    ] = None
    user: Annotated[Tag | None, Meta(description="Accepted, but has no effect.")] = None


class Embedding(Struct, frozen=True, kw_only=True):
    """The vector of one input, of length 1 (L2)."""

    object: Literal["embedding"] = "embedding"
    embedding: Annotated[list[float] | str, Meta(description="Numbers, of which some forms are integers, or base64.")]
    index: int


class EmbeddingsUsage(Struct, frozen=True):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(Struct, frozen=True, kw_only=True):
    """Vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
