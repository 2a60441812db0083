"""The sampling and stop fields that all of OpenAI's routes share."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from lmserve.schemas.bounds import (
    MAX_TOKENS,
    MinP,
    RepetitionPenalty,
    Seed,
    StopStrings,
    Temperature,
    TopK,
    TopP,
)

UNLIMITED = -1  # the same as null, for clients that always send a number
# Maximum number of tokens to generate. 0 is within the limits, but the handler refuses it.
OutputLimit = Annotated[int, Meta(ge=UNLIMITED, le=MAX_TOKENS)] | None
ThinkingBudget = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]


class SamplingRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sampling fields of chat completions, completions and responses."""

    temperature: Annotated[
        Temperature | None, Meta(description="0 is greedy. Null: the model's default, or 1 if it has none.")
    ] = None
    top_p: Annotated[
        TopP | None,
        Meta(
            description="Sample only from the most likely tokens whose probabilities add up to this. Null: the model's "
            "default, or 1."
        ),
    ] = None
    top_k: Annotated[
        TopK | None,
        Meta(
            description="Sample only from the k most likely tokens. 0 or -1: from all tokens. Null: the model's "
            "default, or all."
        ),
    ] = None
    min_p: Annotated[
        MinP | None,
        Meta(
            description="Sample only from tokens whose probability is at least this fraction of the most likely "
            "token's."
        ),
    ] = None
    repetition_penalty: Annotated[
        RepetitionPenalty | None,
        Meta(
            description="Makes tokens that occur in the prompt or the output less likely. 1 is off. Null: the model's "
            "default, or 1."
        ),
    ] = None
    seed: Annotated[
        Seed | None, Meta(description="The same request with the same seed gets the same tokens. Null: a random seed.")
    ] = None
    stop: Annotated[
        bool | StopStrings | None,
        Meta(
            description="Strings that end the text. They are not part of it. LMDeploy's clients may send false for "
            "none, or true to cancel the running turn of a chat's session."
        ),
    ] = None
    ignore_eos: Annotated[bool | None, Meta(description="Do not stop at an end token.")] = None
